"use strict";
/* Each figure as one SVG in the page's present colours, and its numbers as CSV. */
const GAP = 8, LINE = 18, MARGIN = 10;

function save(text, type, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function toCsv(table) {
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return [...table.rows].map((row) => [...row.cells].map((cell) => quote(cell.textContent.trim())).join(",")).join("\n") + "\n";
}

function toSvg(figure) {
  const page = getComputedStyle(document.documentElement), ink = page.getPropertyValue("--ink").trim();
  const resolve = (text) => {
    let last;
    do { last = text; text = text.replace(/var\((--\w+)\)/g, (_, name) => page.getPropertyValue(name).trim()); } while (text !== last);
    return text.replaceAll("currentColor", ink);
  };
  const escape = (text) => text.trim().replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  let top = MARGIN + 2 * LINE;
  const legend = [...figure.querySelectorAll(".legend li")].map((item) => {
    top += LINE;
    const mark = item.querySelector("span");
    return `<text x="${MARGIN}" y="${top - LINE}" font-size="13" fill="${ink}"><tspan fill="${resolve(mark.style.color)}">${escape(mark.textContent)}</tspan> ${escape(item.lastChild.textContent)}</text>`;
  });
  let width = 0;
  const panels = [...figure.querySelectorAll(".chart > svg")].map((svg) => {
    const [, , across, down] = svg.getAttribute("viewBox").split(" ").map(Number), scale = parseFloat(svg.style.width) / across;
    const copy = svg.cloneNode(true);
    for (const [name, value] of [["x", MARGIN], ["y", top], ["width", across * scale], ["height", down * scale]]) copy.setAttribute(name, value);
    copy.removeAttribute("style");
    top += down * scale + GAP; width = Math.max(width, across * scale);
    return resolve(new XMLSerializer().serializeToString(copy));
  });
  const title = figure.querySelector(".title").textContent;
  const across = Math.max(width, 8 * title.length, 260) + 2 * MARGIN;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${across}" height="${top + MARGIN}" font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="${page.getPropertyValue("--panel").trim()}"/><text x="${MARGIN}" y="${MARGIN + LINE}" font-size="15" font-weight="600" fill="${ink}">${escape(title)}</text>${legend.join("")}${panels.join("")}</svg>`;
}

function offerDownloads() {
  for (const figure of document.querySelectorAll("figure[data-figure]")) {
    const name = figure.dataset.figure, table = figure.querySelector("details table");
    const bar = Object.assign(document.createElement("div"), { className: "downloads" });
    const offer = (kind, made) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: kind, title: `download ${name}.${kind.toLowerCase()}` });
      button.addEventListener("click", made);
      bar.append(button);
    };
    offer("SVG", () => save(toSvg(figure), "image/svg+xml", `${name}.svg`));
    if (table) offer("CSV", () => save(toCsv(table), "text/csv", `${name}.csv`));
    figure.append(bar);
  }
}
