"use strict";
/* Charts of what the results hold; nothing is computed but scales. */
const results = JSON.parse(document.getElementById("results").textContent);
const points = JSON.parse(document.getElementById("points").textContent);
const behind = JSON.parse(document.getElementById("documents").textContent); /* heat maps: [document][layer][head] */
const dark = matchMedia("(prefers-color-scheme: dark)");
const COLOURS = () => (dark.matches
  ? ["#56B4E9", "#E69F00", "#4cc9a0", "#e79ac8", "#ff8a50", "#b9c4cf", "#F0E442"]
  : ["#0072B2", "#D55E00", "#00795a", "#a8467f", "#9a6a00", "#444c56", "#1b1f24"]);
const find = (section, metric) => results.records.filter((r) => r.section === section && r.metric === metric && r.value !== null);
const flat = (rows) => rows.map((r) => ({ ...r.at, value: r.value, low: r.low, high: r.high, p: r.adjusted_p, n: r.num_documents, unit: r.unit }));
const digits = (x) => (x === null || x === undefined ? "n/a" : Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 0.01 || x === 0 ? x.toFixed(3) : x.toExponential(1));
const spread = (d) => (d.low === null ? digits(d.value) : `${digits(d.value)} (${digits(d.low)} to ${digits(d.high)})`);
const width = (node, most) => Math.max(280, Math.min(most, node.clientWidth || most));

function label(title, d, keys) {
  return [title, ...keys.map((k) => `${k} ${Number.isInteger(d[k]) || typeof d[k] !== "number" ? d[k] : Number(d[k].toPrecision(4))}`), `${spread(d)} ${d.unit}`, ...(d.p === null || d.p === undefined ? [] : [`adjusted p ${digits(d.p)}`])].join("\n");
}

const MAPS = [["entropy_drop", "entropy drop"], ["log_odds_boost", "log-odds boost"], ["meta_mass", "meta mass"]];
let chosenCell = null; /* of the heat maps: its layer and head */

function heat(node, metric, title) {
  const data = flat(find("attention", metric)).filter((d) => "head" in d);
  if (!data.length) return null;
  const most = d3.max(data, (d) => Math.abs(d.value)) || 1;
  const signed = data.some((d) => d.value < 0);
  const chart = Plot.plot({
    width: width(node, 330), height: 62 + 20 * new Set(data.map((d) => d.layer)).size, marginLeft: 44, marginBottom: 40,
    x: { label: "head", tickFormat: "d", type: "band" }, y: { label: "layer", tickFormat: "d", type: "band", reverse: true },
    color: { type: "linear", scheme: signed ? "PuOr" : "cividis", domain: signed ? [-most, most] : [0, most], legend: true, label: data[0].unit === "1" ? title : `${title}, ${data[0].unit}` },
    marks: [
      Plot.cell(data, { x: "head", y: "layer", fill: "value", inset: 0.5 }),
      Plot.dot(data.filter((d) => d.p !== null && d.p !== undefined && d.p <= 0.05), { x: "head", y: "layer", r: 2, fill: "#000", stroke: "#fff", strokeWidth: 0.8, pointerEvents: "none" }),
      Plot.tip(data, Plot.pointer({ x: "head", y: "layer", title: (d) => label(title, d, ["layer", "head"]), fill: "var(--paper)" })),
    ],
  });
  for (const rect of chart.querySelectorAll("g[aria-label=cell] rect")) rect.cell = data[rect.__data__];
  return chart;
}

/* One dot a document behind a cell, with the mean and the interval of its record. */
function documentDots(node, metric, title, { layer, head }) {
  const [record] = flat(find("attention", metric)).filter((d) => d.layer === layer && d.head === head);
  const data = (behind[metric] || []).flatMap((one, number) => (one[layer]?.[head] ?? null) === null ? [] : [{ number, value: one[layer][head] }]);
  if (!record || !data.length) return null;
  const unit = record.unit === "1" ? "" : ` ${record.unit}`;
  const box = document.createElement("div"), text = document.createElement("p");
  text.textContent = `${title}: ${spread(record)}${unit}, n\u00a0=\u00a0${record.n}`;
  box.append(text, Plot.plot({
    width: width(node, 330), height: 150, marginLeft: 44, marginBottom: 38,
    ariaLabel: `${title} of each document, layer ${layer}, head ${head}`,
    x: { label: `${title}${unit && `,${unit}`}`, nice: true, ticks: 5 },
    y: { label: "document", domain: [-1, behind[metric].length], ticks: 4, tickFormat: (y) => (Number.isInteger(y) && y >= 0 && y < behind[metric].length ? String(y) : "") },
    marks: [
      Plot.frame({ stroke: "var(--line)" }),
      Plot.ruleX([0], { strokeOpacity: 0.5, strokeDasharray: "3,3" }),
      ...(record.low === null ? [] : [Plot.rect([record], { x1: "low", x2: "high", fill: COLOURS()[1], fillOpacity: 0.25 })]),
      Plot.ruleX([record], { x: "value", stroke: COLOURS()[1], strokeWidth: 2 }),
      Plot.dot(data, { x: "value", y: "number", r: 2.6, fill: COLOURS()[0], fillOpacity: 0.8 }),
      Plot.tip(data, Plot.pointer({ x: "value", y: "number", title: (d) => `document ${d.number}\n${digits(d.value)}${unit}`, fill: "var(--paper)" })),
    ],
  }));
  return box;
}

/* Below the heat maps: which cell, and the documents behind it; a click on a cell does the same as the two selects. */
function cellPanel(node, maps) {
  const panel = document.createElement("div"), charts = document.createElement("div"), link = document.createElement("p");
  panel.className = "cell"; charts.className = "charts"; link.className = "note";
  panel.innerHTML = '<div class="controls"><label>Layer <select id="cell-layer"></select></label><label>Head <select id="cell-head"></select></label></div><p class="note">Click a cell, or choose a layer and a head, to see the documents behind it: a dot is one, the line is their mean, the band its interval.</p>';
  panel.append(charts, link);
  const cells = [...maps.querySelectorAll("g[aria-label=cell] rect")];
  const selects = ["layer", "head"].map((key) => [key, panel.querySelector(`#cell-${key}`)]);
  for (const [key, select] of selects) {
    const values = [...new Set(cells.map((rect) => rect.cell[key]))].sort((a, b) => a - b);
    select.replaceChildren(...["", ...values].map((value) => Object.assign(document.createElement("option"), { value, textContent: value === "" ? "choose" : value })));
    select.addEventListener("change", () => {
      const [layer, head] = selects.map(([, one]) => one.value);
      choose(layer === "" || head === "" ? null : { layer: Number(layer), head: Number(head) });
    });
  }
  for (const rect of cells) {
    rect.style.cursor = "pointer";
    rect.addEventListener("click", () => choose({ layer: rect.cell.layer, head: rect.cell.head }));
  }
  // a click chooses and does not hold the tip in place
  for (const svg of new Set(cells.map((rect) => rect.ownerSVGElement))) svg.addEventListener("pointerdown", (event) => event.stopPropagation(), true);

  function choose(cell) {
    chosenCell = cell;
    maps.querySelectorAll("g.chosen").forEach((frame) => frame.remove());
    charts.replaceChildren(); link.replaceChildren();
    if (!cell) return;
    for (const [key, select] of selects) select.value = String(cell[key]);
    for (const rect of cells) if (rect.cell.layer === cell.layer && rect.cell.head === cell.head) outline(rect);
    charts.append(...MAPS.map(([metric, title]) => documentDots(node, metric, title, cell)).filter(Boolean));
    for (const svg of charts.querySelectorAll("svg")) svg.setAttribute("role", "img");
    if (!charts.childElementCount) charts.textContent = "No document has this number.";
    if (!document.getElementById("token-view")) return;
    const anchor = Object.assign(document.createElement("a"), { href: `#quantity=attention&layer=${cell.layer}&head=${cell.head}`, textContent: `See layer ${cell.layer}, head ${cell.head} token by token` });
    anchor.addEventListener("click", () => document.getElementById("tokens").scrollIntoView());
    link.append(anchor);
  }

  choose(chosenCell);
  return panel;
}

/* A frame that is seen on any colour. */
function outline(rect) {
  const frame = document.createElementNS(rect.namespaceURI, "g"), transform = rect.parentNode.getAttribute("transform");
  frame.setAttribute("class", "chosen"); frame.setAttribute("pointer-events", "none");
  if (transform) frame.setAttribute("transform", transform);
  for (const [stroke, size] of [["var(--paper)", 5], ["var(--ink)", 2.5]]) {
    const line = rect.cloneNode();
    for (const [name, value] of Object.entries({ fill: "none", stroke, "stroke-width": size })) line.setAttribute(name, value);
    frame.append(line);
  }
  rect.ownerSVGElement.append(frame);
}

function lines(node, data, { x, stroke, xLabel, yLabel, facet, log, root, rules, also = [], most = 720 }) {
  const places = [...new Set(data.map((d) => d[x]))];
  const names = [...new Set(data.map((d) => String(d[stroke])))];
  const common = { x, stroke: (d) => String(d[stroke]), ...(facet ? { fx: facet } : {}) };
  return Plot.plot({
    width: width(node, most), height: 300, marginLeft: 52, marginBottom: 40,
    x: { label: xLabel, type: log ? "log" : root ? "sqrt" : "linear", base: 2, nice: !log, ...(log || x === "layer" ? { ticks: places, tickFormat: log ? "~g" : "d" } : {}) },
    y: { label: yLabel, grid: true, nice: true }, fx: { label: facet === "direction" ? null : facet || null },
    color: { domain: names, range: COLOURS(), legend: true },
    marks: [
      Plot.ruleY([0], { strokeOpacity: 0.4 }), ...(rules || []),
      Plot.areaY(data.filter((d) => d.low !== null), { ...common, y1: "low", y2: "high", fill: (d) => String(d[stroke]), stroke: undefined, fillOpacity: 0.18 }),
      Plot.lineY(data, { ...common, y: "value", strokeWidth: 1.8 }),
      Plot.dot(data, { ...common, y: "value", fill: (d) => String(d[stroke]), r: 2.6 }),
      Plot.tip(data, Plot.pointer({ ...common, stroke: undefined, y: "value", title: (d) => label(String(d[stroke]), d, [x, ...(facet ? [facet] : []), ...also]), fill: "var(--paper)" })),
    ],
  });
}

/* Data at no more than `most` values of a coordinate, evenly spaced. */
function someOf(data, key, most) {
  const values = [...new Set(data.map((d) => d[key]))].sort((a, b) => a - b);
  const shown = new Set(values.length <= most ? values : d3.range(most).map((i) => values[Math.round((i * (values.length - 1)) / (most - 1))]));
  return data.filter((d) => shown.has(d[key]));
}

function bars(node, data, { y, xLabel, title }) {
  return Plot.plot({
    width: width(node, 640), marginLeft: 16 + 6.2 * d3.max(data, (d) => String(d[y]).length), marginBottom: 40, height: 46 + 34 * data.length,
    x: { label: xLabel, grid: true, nice: true }, y: { label: null, domain: data.map((d) => d[y]) },
    marks: [
      Plot.barX(data, { x: "value", y, fill: COLOURS()[0], fillOpacity: 0.75, insetTop: 5, insetBottom: 5 }),
      Plot.ruleX([0]),
      Plot.ruleY(data.filter((d) => d.low !== null), { x1: "low", x2: "high", y, strokeWidth: 2 }),
      Plot.tip(data, Plot.pointerY({ x: "value", y, title: (d) => label(title, d, [y]), fill: "var(--paper)" })),
    ],
  });
}

const FIGURES = {
  "attention-maps"(node) {
    const box = document.createElement("div"), maps = document.createElement("div");
    maps.className = "maps";
    maps.append(...MAPS.map(([metric, title]) => heat(node, metric, title)).filter(Boolean));
    box.append(maps);
    if (Object.keys(behind).length) box.append(cellPanel(node, maps));
    return maps.childElementCount ? box : null;
  },
  theorem(node) {
    if (!points.length) return null;
    const data = points.filter((point) => !point.slice(1, 3).includes(null)).map(([layer, margin, boost, critical]) => ({
      layer, margin, boost,
      kind: boost <= 0 ? "not boosted" : margin >= 0 ? "premise holds: falls" : boost > critical ? "beyond the critical boost: falls" : "below it: rises",
    }));
    const order = ["premise holds: falls", "beyond the critical boost: falls", "below it: rises", "not boosted"];
    const lowest = d3.min(data, (d) => d.margin);
    return Plot.plot({
      width: width(node, 720), height: 380, marginLeft: 52, marginBottom: 40,
      x: { label: "margin x without the embedding, nats", nice: true }, y: { label: "boost, nats", nice: true, grid: true },
      color: { domain: order, range: [COLOURS()[2], COLOURS()[0], COLOURS()[1], "#8b949e"], legend: true },
      marks: [
        Plot.ruleX([0]), Plot.ruleY([0]),
        ...(lowest < 0 ? [Plot.line([[lowest, -lowest], [0, 0]], { strokeDasharray: "4,3" }), Plot.line([[lowest, -2 * lowest], [0, 0]], { strokeDasharray: "1,3" })].map((m) => m) : []),
        Plot.dot(data, { x: "margin", y: "boost", stroke: "kind", r: 2, strokeOpacity: 0.7, clip: true }),
        Plot.tip(data, Plot.pointer({ x: "margin", y: "boost", title: (d) => `layer ${d.layer}\nmargin ${digits(d.margin)}\nboost ${digits(d.boost)}\n${d.kind}`, fill: "var(--paper)" })),
      ],
    });
  },
  distances(node) {
    const data = flat(find("attention", "mass_by_distance")).filter((d) => d.distance > 0);
    const kept = someOf(data, "layer", width(node, 900) < 500 ? 2 : 4);
    return kept.length ? lines(node, kept, { x: "distance", stroke: "to", facet: "layer", xLabel: "distance, tokens", yLabel: "attention mass", log: true, most: 900 }) : null;
  },
  mechanism(node) {
    const data = [...flat(find("theory", "mechanism")).map((d) => ({ ...d, what: "by the meta keys' logits" })), ...flat(find("theory", "change")).map((d) => ({ ...d, what: "whole change" }))].filter((d) => "layer" in d);
    return data.length ? lines(node, data, { x: "layer", stroke: "what", xLabel: "layer", yLabel: "change of entropy, nats", most: 560 }) : null;
  },
  similarity(node) {
    const data = flat(find("similarity", "cosine")).filter((d) => d.form === "centred" && "distance" in d);
    const kept = someOf(data, "layer", width(node, 900) < 500 ? 2 : 4);
    return kept.length ? lines(node, kept, { x: "distance", stroke: "kind", facet: "layer", xLabel: "distance, tokens", yLabel: "centred cosine", log: true, most: 900 }) : null;
  },
  decodability(node) {
    const data = flat(find("readouts", "decodability")).filter((d) => "layer" in d && "window" in d);
    return data.length ? lines(node, data, { x: "layer", stroke: "state", facet: "window", xLabel: "layer", yLabel: "held-out R\u00b2", most: 900 }) : null;
  },
  "logit-lens"(node) {
    const data = flat(find("readouts", "reciprocal_rank")).filter((d) => "distance" in d).map((d) => ({ ...d, from: `${d.state}, ${d.read}` }));
    const most = width(node, 900) < 500 ? 2 : 4, shown = someOf(data, "distance", most);
    return data.length ? lines(node, shown, { x: "layer", stroke: "from", facet: "distance", xLabel: "layer", yLabel: "mean reciprocal rank", most: 900 }) : null;
  },
  attribution(node) {
    const data = flat(find("readouts", "attribution")).filter((d) => "layer" in d);
    return data.length ? lines(node, data, { x: "layer", stroke: "component", xLabel: "layer", yLabel: "part of the logit", most: 560 }) : null;
  },
  "branch-strength"(node) {
    const data = flat(find("readouts", "branch_strength")).filter((d) => "layer" in d);
    return data.length ? lines(node, data, { x: "layer", stroke: "branch", xLabel: "layer", yLabel: "length over that of the stream", most: 560 }) : null;
  },
  erasure(node) {
    const data = flat(find("probes", "erasure_loss")).filter((d) => "layer" in d);
    return data.length ? lines(node, data, { x: "layer", stroke: "erased", xLabel: "layer", yLabel: "rise of the loss, nats", most: 560 }) : null;
  },
  capacity(node) {
    const data = flat(find("causal", "capacity")).map((d) => ({ ...d, what: "accuracy" }));
    return data.length ? lines(node, data, { x: "size", stroke: "what", xLabel: "size of the task", yLabel: "accuracy", most: 560 }) : null;
  },
  "rate-distortion"(node) {
    const rate = new Map(find("rate_distortion", "rate").map((r) => [`${r.at.state}|${r.at.beta}`, r.value]));
    const data = flat(find("rate_distortion", "distortion")).map((d) => ({ ...d, rate: rate.get(`${d.state}|${d.beta}`) })).filter((d) => d.rate !== undefined);
    const order = new Map([...new Set(data.map((d) => d.state))].map((state, index) => [state, index]));
    data.sort((a, b) => order.get(a.state) - order.get(b.state) || a.rate - b.rate);
    if (!data.length) return null;
    const last = d3.max(data, (d) => d.rate);
    const rules = find("rate_distortion", "label_entropy").flatMap((r) => [
      Plot.ruleY([r.value], { strokeDasharray: "4,3" }),
      Plot.text([[last, r.value]], { text: ["H(Y)"], textAnchor: "end", dy: 9 }),
    ]);
    const states = new Set(data.map((d) => d.state));
    const left = flat(find("probes", "remaining_entropy")).filter((d) => states.has(d.state));
    rules.push(Plot.ruleY(left, { y: "value", stroke: "state", strokeDasharray: "1,3" }));
    return lines(node, data, { x: "rate", stroke: "state", xLabel: "rate, nats (root scale)", yLabel: "distortion, nats", root: true, rules, also: ["beta"], most: 640 });
  },
  zeroing(node) {
    const data = flat(find("causal", "accuracy")).filter((d) => "intervention" in d);
    return data.length ? bars(node, data, { y: "intervention", xLabel: "accuracy", title: "accuracy" }) : null;
  },
  "two-by-two"(node) {
    const data = flat(find("causal", "logit_difference")).filter((d) => "condition" in d);
    return data.length ? bars(node, data, { y: "condition", xLabel: "logit of the answer minus the foil's", title: "logit difference" }) : null;
  },
  interchange(node) {
    const data = flat(find("causal", "interchange")).filter((d) => "layer" in d && "where" in d && (d.window ?? 1) === 1).map((d) => ({ ...d, direction: d.direction === "noise" ? "corrupt into clean" : "clean into corrupt" }));
    return data.length ? lines(node, data, { x: "layer", stroke: "where", facet: "direction", xLabel: "layer", yLabel: "share of the way to the other prompt", most: 900 }) : null;
  },
  knockout(node) {
    const data = flat(find("causal", "knockout")).filter((d) => "layer" in d && "mode" in d);
    return data.length ? lines(node, data, { x: "layer", stroke: "mode", xLabel: "layer", yLabel: "rise of the loss, nats", most: 640 }) : null;
  },
  eviction(node) {
    const data = flat(find("eviction", "cost")).filter((d) => "kept" in d && "policy" in d).sort((a, b) => a.kept - b.kept);
    return data.length ? lines(node, data, { x: "kept", stroke: "policy", xLabel: "share of the cache kept", yLabel: "cost, nats per token", most: 720 }) : null;
  },
  probes(node) {
    const data = flat(find("probes", "v_information")).filter((d) => "state" in d && "target" in d);
    if (!data.length) return null;
    const states = [...new Set(data.map((d) => d.state))], targets = [...new Set(data.map((d) => d.target))];
    return Plot.plot({
      width: width(node, 640), height: 50 + targets.length * (22 + 17 * states.length), marginLeft: 16 + 6.2 * d3.max(states, (s) => s.length), marginRight: 12, marginBottom: 40,
      x: { label: "usable information, nats", grid: true, nice: true }, y: { label: null, domain: states }, fy: { axis: null, domain: targets, padding: 0.16 },
      marks: [
        Plot.text(targets.map((target) => ({ target })), { fy: "target", text: (d) => `of ${d.target}`, frameAnchor: "top-right", dy: -12, fontWeight: 600 }),
        Plot.ruleX([0]),
        Plot.ruleY(data.filter((d) => d.low !== null), { x1: "low", x2: "high", y: "state", fy: "target", strokeWidth: 2 }),
        Plot.dot(data, { x: "value", y: "state", fy: "target", r: 3.2, fill: COLOURS()[0] }),
        Plot.tip(data, Plot.pointerY({ x: "value", y: "state", fy: "target", title: (d) => label("V-information", d, ["state", "target"]), fill: "var(--paper)" })),
      ],
    });
  },
};

function drawAll() {
  for (const figure of document.querySelectorAll("figure[data-figure]")) {
    const node = figure.querySelector(".chart");
    if (!node) continue;
    const chart = FIGURES[figure.dataset.figure](node);
    node.replaceChildren(...(chart ? [chart] : []));
    for (const svg of node.querySelectorAll("svg")) {
      svg.setAttribute("role", "img");
      if (!svg.hasAttribute("aria-label")) svg.setAttribute("aria-label", figure.getAttribute("aria-label"));
    }
  }
}
