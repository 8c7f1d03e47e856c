"use strict";
/* Below the heat maps: which cell, and the documents behind it; a click on a cell does the same as the two selects. */
const DOTS = { width: 310, height: 150, left: 34, right: 10, top: 6, bottom: 34 };

function element(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/* About four round numbers from low to high. */
function ticks(low, high) {
  const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.max(1, Math.floor(high / step) - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/* One dot a document behind a cell, with the mean and the interval of its record. */
function documentDots({ name, unit, documents, cells }, layer, head) {
  const cell = cells.find(([ofLayer, ofHead]) => ofLayer === layer && ofHead === head);
  const dots = documents.flatMap((one, number) => ((one[layer]?.[head] ?? null) === null ? [] : [[number, one[layer][head]]]));
  if (!cell || !dots.length) return null;
  const [, , value, low, high, estimate] = cell, { width, height, left, right, top, bottom } = DOTS;
  const all = [0, value, ...(low === null ? [] : [low, high]), ...dots.map(([, x]) => x)];
  const least = Math.min(...all), most = Math.max(...all), base = height - bottom;
  const x = (number) => left + ((number - least) / (most - least || 1)) * (width - left - right);
  const y = (number) => base - ((number + 0.5) / documents.length) * (base - top);
  const line = (at, attributes) => element("line", { x1: x(at), x2: x(at), y1: top, y2: base, ...attributes });
  const middle = { "text-anchor": "middle" };
  const box = document.createElement("div"), text = document.createElement("p");
  text.textContent = `${name}: ${estimate}, n\u00a0=\u00a0${dots.length}`;
  box.append(text, element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name} of each document, layer ${layer}, head ${head}` },
    element("rect", { x: left, y: top, width: width - left - right, height: base - top, fill: "none", stroke: "var(--line)" }),
    line(0, { stroke: "currentColor", "stroke-opacity": 0.5, "stroke-dasharray": "3,3" }),
    ...(low === null ? [] : [element("rect", { class: "interval", x: x(low), y: top, width: x(high) - x(low), height: base - top, fill: "var(--c1)", "fill-opacity": 0.25 })]),
    line(value, { stroke: "var(--c1)", "stroke-width": 2 }),
    ...dots.map(([number, at]) => element("circle", { cx: x(at), cy: y(number), r: 2.6, fill: "var(--c0)", "fill-opacity": 0.8, "data-tip": `document ${number}\n${Number(at.toPrecision(4))} ${unit}` })),
    ...ticks(least, most).map((at) => element("text", { ...middle, x: x(at), y: base + 13 }, String(at))),
    ...[0, documents.length - 1].map((number) => element("text", { "text-anchor": "end", x: left - 4, y: y(number) + 4 }, String(number))),
    element("text", { ...middle, x: (left + width - right) / 2, y: height - 4 }, unit ? `${name}, ${unit}` : name),
    element("text", { ...middle, transform: `translate(9,${(top + base) / 2}) rotate(-90)` }, "document")));
  return box;
}

function showDocuments() {
  const behind = Object.values(JSON.parse(document.getElementById("documents").textContent));
  const maps = document.querySelector(".chart.maps");
  if (!maps || !behind.length) return;
  const panel = document.createElement("div"), charts = document.createElement("div"), link = document.createElement("p");
  panel.className = "cell"; charts.className = "charts"; link.className = "note";
  panel.innerHTML = '<div class="controls"><label>Layer <select id="cell-layer"></select></label><label>Head <select id="cell-head"></select></label></div><p class="note">Click a cell, or choose a layer and a head, to see the documents behind it: a dot is one, the line is their mean, the band its interval.</p>';
  panel.append(charts, link);
  maps.after(panel);
  maps.classList.add("has-documents");
  const cells = [...maps.querySelectorAll("[data-layer]")];
  const selects = ["layer", "head"].map((key) => [key, panel.querySelector(`#cell-${key}`)]);
  for (const [key, select] of selects) {
    const values = [...new Set(cells.map((cell) => Number(cell.dataset[key])))].sort((a, b) => a - b);
    select.replaceChildren(...["", ...values].map((value) => Object.assign(document.createElement("option"), { value, textContent: value === "" ? "choose" : value })));
    select.addEventListener("change", () => {
      const chosen = selects.map(([, one]) => one.value);
      choose(chosen.includes("") ? null : chosen.map(Number));
    });
  }
  maps.addEventListener("click", ({ target }) => { if (target.dataset.layer) choose([Number(target.dataset.layer), Number(target.dataset.head)]); });

  function choose(place) {
    const [layer, head] = place ?? [null, null];
    for (const cell of cells) {
      const isChosen = Number(cell.dataset.layer) === layer && Number(cell.dataset.head) === head;
      cell.classList.toggle("chosen", isChosen && place !== null);
      // above its neighbours and below the dot that lies on it
      if (isChosen && place !== null) [...cell.ownerSVGElement.querySelectorAll("[data-layer]")].at(-1).closest("g").after(cell.closest("g"));
    }
    charts.replaceChildren(); link.replaceChildren();
    if (place === null) return;
    selects.forEach(([, select], index) => { select.value = String(place[index]); });
    charts.append(...behind.map((one) => documentDots(one, layer, head)).filter(Boolean));
    if (!charts.childElementCount) charts.textContent = "No document has this number.";
    if (!document.getElementById("token-view")) return;
    const anchor = Object.assign(document.createElement("a"), { href: `#quantity=attention&layer=${layer}&head=${head}`, textContent: `See layer ${layer}, head ${head} token by token` });
    anchor.addEventListener("click", () => document.getElementById("tokens").scrollIntoView());
    link.append(anchor);
  }
}
