"use strict";
/* Draws what the results hold and computes nothing but scales. */
const results = JSON.parse(document.getElementById("results").textContent);
const points = JSON.parse(document.getElementById("points").textContent);
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

function heat(node, metric, title) {
  const data = flat(find("attention", metric)).filter((d) => "head" in d);
  if (!data.length) return null;
  const most = d3.max(data, (d) => Math.abs(d.value)) || 1;
  const signed = data.some((d) => d.value < 0);
  return Plot.plot({
    width: width(node, 330), height: 62 + 20 * new Set(data.map((d) => d.layer)).size, marginLeft: 44, marginBottom: 40,
    x: { label: "head", tickFormat: "d", type: "band" }, y: { label: "layer", tickFormat: "d", type: "band", reverse: true },
    color: { type: "linear", scheme: signed ? "PuOr" : "cividis", domain: signed ? [-most, most] : [0, most], legend: true, label: data[0].unit === "1" ? title : `${title}, ${data[0].unit}` },
    marks: [
      Plot.cell(data, { x: "head", y: "layer", fill: "value", inset: 0.5 }),
      Plot.dot(data.filter((d) => d.p !== null && d.p !== undefined && d.p <= 0.05), { x: "head", y: "layer", r: 2, fill: "#000", stroke: "#fff", strokeWidth: 0.8 }),
      Plot.tip(data, Plot.pointer({ x: "head", y: "layer", title: (d) => label(title, d, ["layer", "head"]), fill: "var(--paper)" })),
    ],
  });
}

function lines(node, data, { x, stroke, xLabel, yLabel, facet, log, rules, also = [], most = 720 }) {
  const places = [...new Set(data.map((d) => d[x]))];
  const names = [...new Set(data.map((d) => String(d[stroke])))];
  const common = { x, stroke: (d) => String(d[stroke]), ...(facet ? { fx: facet } : {}) };
  return Plot.plot({
    width: width(node, most), height: 300, marginLeft: 52, marginBottom: 40,
    x: { label: xLabel, type: log ? "log" : "linear", base: 2, nice: !log, ...(log || x === "layer" ? { ticks: places, tickFormat: log ? "~g" : "d" } : {}) },
    y: { label: yLabel, grid: true, nice: true }, fx: { label: facet || null },
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
    const box = document.createElement("div");
    box.style.cssText = "display:flex;flex-wrap:wrap;gap:1rem";
    for (const [metric, title] of [["entropy_drop", "entropy drop"], ["log_odds_boost", "log-odds boost"], ["meta_mass", "meta mass"]]) {
      const chart = heat(node, metric, title);
      if (chart) box.append(chart);
    }
    return box.childElementCount ? box : null;
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
    return data.length ? lines(node, data, { x: "layer", stroke: "component", xLabel: "layer", yLabel: "logit of the answer minus the foil's", most: 560 }) : null;
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
    const data = flat(find("rate_distortion", "distortion")).map((d) => ({ ...d, rate: rate.get(`${d.state}|${d.beta}`) })).filter((d) => d.rate !== undefined).sort((a, b) => a.rate - b.rate);
    if (!data.length) return null;
    const last = d3.max(data, (d) => d.rate);
    const rules = find("rate_distortion", "label_entropy").flatMap((r) => [
      Plot.ruleY([r.value], { strokeDasharray: "4,3" }),
      Plot.text([[last, r.value]], { text: ["H(Y)"], textAnchor: "end", dy: 9 }),
    ]);
    const states = new Set(data.map((d) => d.state));
    const left = flat(find("probes", "remaining_entropy")).filter((d) => states.has(d.state));
    rules.push(Plot.ruleY(left, { y: "value", stroke: "state", strokeDasharray: "1,3" }));
    return lines(node, data, { x: "rate", stroke: "state", xLabel: "rate, nats", yLabel: "distortion, nats", rules, also: ["beta"], most: 640 });
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
    const data = flat(find("causal", "interchange")).filter((d) => "layer" in d && "where" in d && (d.window ?? 1) === 1).map((d) => ({ ...d, put: d.direction === "noise" ? "corrupt into clean" : "clean into corrupt" }));
    return data.length ? lines(node, data, { x: "layer", stroke: "where", facet: "put", xLabel: "layer", yLabel: "share of the way to the other prompt", most: 900 }) : null;
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
      width: width(node, 640), height: 50 + targets.length * (22 + 17 * states.length), marginLeft: 16 + 6.2 * d3.max(states, (s) => s.length), marginRight: 96, marginBottom: 40,
      x: { label: "usable information, nats", grid: true, nice: true }, y: { label: null, domain: states }, fy: { label: null, domain: targets },
      marks: [
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

/* Token view ---------------------------------------------------------------------------------------------------- */

const META_MARK = "\u25c6";
const DARKEST = 0.55; /* of a shade, so that the text on it keeps a contrast of 4.5 */
const whole = (text, end) => (text !== null && /^\d+$/.test(String(text)) && Number(text) < end ? Number(text) : null);

async function unpack(text, signed) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const buffer = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  return signed ? new Int8Array(buffer) : new Uint8Array(buffer);
}

class TokenView {
  constructor(root, documents) {
    this.root = root; this.documents = documents; this.pinned = null; this.query = 0; this.received = new Map();
    this.state = { text: 0, quantity: null, layer: 0, head: "mean", meta: 1 };
    this.get = (id) => document.getElementById(id);
  }

  async start() {
    this.readHash();
    for (const [id, key] of [["view-text", "text"], ["view-quantity", "quantity"], ["view-layer", "layer"], ["view-head", "head"]]) {
      this.get(id).addEventListener("change", async (event) => { await this.change(key, event.target.value); });
    }
    this.get("view-meta").addEventListener("change", (event) => this.change("meta", event.target.checked ? 1 : 0));
    const strip = this.get("strip");
    strip.addEventListener("pointerover", (e) => this.point(e.target.dataset?.index));
    strip.addEventListener("click", (e) => this.pin(e.target.dataset?.index));
    strip.addEventListener("keydown", (e) => this.key(e));
    this.get("matrix").addEventListener("pointermove", (e) => this.point(this.tokenAt(e)));
    this.get("matrix").addEventListener("click", (e) => this.pin(this.tokenAt(e)));
    this.get("heads").addEventListener("keydown", (e) => this.moveHead(e));
    addEventListener("hashchange", async () => { if (location.hash.includes("=")) { this.readHash(); await this.load(); this.render(); } });
    await this.load();
    this.root.hidden = false;
    this.render();
  }

  readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const [key, value] of given) if (Object.hasOwn(this.state, key)) this.state[key] = value;
    this.query = whole(given.get("query"), Infinity) ?? this.query;
    this.pinned = whole(given.get("pinned"), Infinity);
    this.state.text = whole(this.state.text, this.documents.length) ?? 0;
  }

  /* An address can be written by hand, or for another page. */
  repair() {
    const [numLayers, numHeads] = this.arrays.attention.shape;
    this.state.layer = whole(this.state.layer, numLayers) ?? 0;
    this.state.head = whole(this.state.head, numHeads) ?? "mean";
    this.state.meta = whole(this.state.meta, 2) ?? 1;
    this.query = Math.min(this.query, this.count - 1);
    if (this.pinned !== null && this.pinned >= this.count) this.pinned = null;
  }

  /* The row of the matrix under the pointer, as the index of its token. */
  tokenAt(event) {
    const box = event.target.getBoundingClientRect(), rows = this.arrays[this.matrixName()].shape[2];
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    return this.matrixName() === "meta_attention" ? this.metaColumns[row] : row;
  }

  matrixName() { return this.state.quantity === "meta_attention" ? "meta_attention" : "attention"; }

  moveHead(event) {
    const [numLayers, numHeads] = this.arrays.attention.shape, at = [...this.get("heads").children].indexOf(event.target);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: numHeads, ArrowUp: -numHeads }[event.key];
    if (!step || at < 0) return;
    event.preventDefault();
    const next = this.get("heads").children[at + step];
    if (at + step >= 0 && at + step < numLayers * numHeads) { next.focus(); next.click(); }
  }

  writeHash() {
    const state = new URLSearchParams({ ...this.state, query: this.query, ...(this.pinned === null ? {} : { pinned: this.pinned }) });
    history.replaceState(null, "", `#${state}`);
  }

  async change(key, value) {
    this.state[key] = value;
    if (key === "text") { this.pinned = null; this.query = 0; await this.load(); }
    this.render();
    this.writeHash();
  }

  async load() {
    this.view = this.documents[Number(this.state.text)];
    this.count = this.view.tokens.length;
    this.arrays = {};
    for (const [name, array] of Object.entries(this.view.arrays)) {
      this.arrays[name] = { shape: array.shape, data: array.values || (await unpack(array.gzip, array.signed)) };
    }
    this.received.clear(); this.painted = null;
    const options = [
      ["attention", "attention of a head"], ["received", "attention received"], ["meta_attention", "meta-attention"],
      ["cosine_centred", "cosine with earlier tokens, centred"], ["cosine_raw", "cosine with earlier tokens, raw"],
      ["loss", "loss: without minus with meta-tokens"],
    ];
    const available = options.filter(([name]) => name === "received" ? this.arrays.attention : name === "loss" ? this.arrays.loss_with && this.arrays.loss_without : this.arrays[name]);
    this.fill("view-quantity", available);
    if (!available.some(([name]) => name === this.state.quantity)) this.state.quantity = available[0][0];
    const [numLayers, numHeads] = this.arrays.attention.shape;
    this.fill("view-layer", d3.range(numLayers).map((i) => [String(i), String(i)]));
    this.fill("view-head", [["mean", "mean"], ...d3.range(numHeads).map((i) => [String(i), String(i)])]);
    this.metaIndex = this.view.is_meta.flatMap((meta, i) => (meta ? [i] : []));
    this.metaColumns = this.arrays.meta_attention_tokens?.data ?? this.metaIndex;
    this.repair(); this.strip(); this.thumbnails();
  }

  fill(id, options) {
    this.get(id).replaceChildren(...options.map(([value, text]) => Object.assign(document.createElement("option"), { value, textContent: text })));
  }

  strip() {
    const strip = this.get("strip");
    strip.replaceChildren(...this.view.tokens.map((token, index) => {
      const span = document.createElement("span");
      span.dataset.index = index; span.id = `token-${index}`;
      span.setAttribute("role", "option");
      span.className = this.view.is_meta[index] ? "meta" : "";
      span.textContent = this.view.is_meta[index] ? META_MARK : token;
      return span;
    }));
  }

  thumbnails() {
    const [numLayers, numHeads] = this.arrays.attention.shape;
    const box = this.get("heads");
    box.style.gridTemplateColumns = `repeat(${numHeads}, 34px)`;
    const size = Math.min(32, this.count);
    box.replaceChildren(...d3.range(numLayers).flatMap((layer) => d3.range(numHeads).map((head) => {
      const button = document.createElement("button");
      button.type = "button"; button.dataset.layer = layer; button.dataset.head = head;
      button.setAttribute("aria-label", `layer ${layer}, head ${head}`); button.title = `layer ${layer}, head ${head}`;
      const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
      this.paint(canvas, (q, k) => this.weight("attention", layer, head, Math.floor((q * this.count) / size), Math.floor((k * this.count) / size)), size);
      button.append(canvas);
      button.addEventListener("click", () => { this.state.quantity = "attention"; this.state.layer = layer; this.change("head", String(head)); });
      return button;
    })));
  }

  /* u8 = round(255 sqrt(a)) */
  weight(name, layer, head, q, k) {
    const { shape: [, numHeads, rows, columns], data } = this.arrays[name];
    const at = (h) => (data[((layer * numHeads + h) * rows + q) * columns + k] / 255) ** 2;
    return head === "mean" ? d3.mean(d3.range(numHeads), at) : at(Number(head));
  }

  value(query, key) {
    const layer = Number(this.state.layer), head = this.state.head;
    switch (this.state.quantity) {
      case "attention": return key > query ? null : this.weight("attention", layer, head, query, key);
      case "received": return this.receivedBy(layer, head)[key];
      case "cosine_raw":
      case "cosine_centred": return key > query ? null : this.arrays[this.state.quantity].data[(layer * this.count + query) * this.count + key] / 127;
      case "meta_attention": {
        const [q, k] = [this.metaColumns.indexOf(query), this.metaColumns.indexOf(key)];
        return q < 0 || k < 0 || k > q ? null : this.weight("meta_attention", layer, head, q, k);
      }
      default: {
        const [a, b] = [this.arrays.loss_without.data[key], this.arrays.loss_with.data[key]];
        return a === null || b === null ? null : a - b;
      }
    }
  }

  /* The mean over the queries that see a key; for every query of the page it is the same. */
  receivedBy(layer, head) {
    const at = `${layer}|${head}`;
    if (!this.received.has(at)) this.received.set(at, d3.range(this.count).map((key) => d3.mean(d3.range(key, this.count), (q) => this.weight("attention", layer, head, q, key))));
    return this.received.get(at);
  }

  point(index) { if (index !== undefined && this.pinned === null) this.choose(Number(index)); }

  pin(index) {
    if (index === undefined) return;
    this.pinned = this.pinned === Number(index) ? null : this.pinned === null ? Number(index) : this.pinned;
    this.choose(Number(index));
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      let next = this.query + step;
      while (!Number(this.state.meta) && this.view.is_meta[next]) next += step;
      if (next >= 0 && next < this.count) this.choose(next);
    } else if (event.key === "Enter" || event.key === " ") this.pin(this.query);
    else if (event.key === "Escape") { this.pinned = null; this.render(); this.writeHash(); }
    else return;
    event.preventDefault();
  }

  choose(index) { this.query = index; this.shade(); this.writeHash(); }

  render() {
    for (const [id, key] of [["view-text", "text"], ["view-quantity", "quantity"], ["view-layer", "layer"], ["view-head", "head"]]) this.get(id).value = String(this.state[key]);
    this.get("view-meta").checked = Boolean(Number(this.state.meta));
    this.get("strip").classList.toggle("no-meta", !Number(this.state.meta));
    for (const button of this.get("heads").children) button.setAttribute("aria-pressed", String(button.dataset.layer === String(this.state.layer) && button.dataset.head === String(this.state.head)));
    // one stop for Tab; arrow keys move among the heads
    const stop = this.get("heads").querySelector("[aria-pressed=true]") || this.get("heads").firstElementChild;
    for (const button of this.get("heads").children) button.tabIndex = button === stop ? 0 : -1;
    this.shade();
  }

  shade() {
    const values = d3.range(this.count).map((k) => this.value(this.query, k));
    const most = d3.max(values, (v) => (v === null ? 0 : Math.abs(v))) || 1;
    const mark = getComputedStyle(document.documentElement).getPropertyValue("--mark");
    [...this.get("strip").children].forEach((span, k) => {
      const value = values[k];
      span.style.backgroundColor = value === null ? "" : value < 0 ? `rgba(213, 94, 0, ${(DARKEST * -value) / most})` : `rgba(${mark}, ${(DARKEST * value) / most})`;
      span.classList.toggle("query", k === this.query);
      span.classList.toggle("pinned", k === this.pinned);
      span.classList.toggle("after", value === null && k > this.query && this.state.quantity === "attention");
      span.setAttribute("aria-selected", String(k === this.query));
    });
    this.get("strip").setAttribute("aria-activedescendant", `token-${this.query}`);
    this.tip(values);
    this.matrix();
  }

  name(k) { return this.view.is_meta[k] ? `meta-token ${this.metaIndex.indexOf(k) + 1}` : JSON.stringify(this.view.tokens[k]); }

  tip(values) {
    const best = d3.range(this.count).filter((k) => values[k] !== null).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b).slice(0, 4);
    const parts = best.map((k) => `${this.name(k)} at ${k}: ${values[k].toFixed(3)}`);
    this.get("tip").textContent = `${this.name(this.query)} at ${this.query}. ${parts.join(", ") || "Nothing to show here."}${this.compared(best)}`;
  }

  /* The same keys for the pinned query, and what the later of the two gives the earlier. */
  compared(keys) {
    if (this.pinned === null || this.pinned === this.query) return "";
    const show = (value) => (value === null ? "n/a" : value.toFixed(3));
    const [early, late] = [this.pinned, this.query].sort((a, b) => a - b);
    return `; of pinned ${this.name(this.pinned)} at ${this.pinned}: ${keys.map((k) => show(this.value(this.pinned, k))).join(", ")}; from ${late} to ${early}: ${show(this.value(late, early))}`;
  }

  paint(canvas, value, size) {
    const context = canvas.getContext("2d");
    const image = context.createImageData(size, size);
    const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--mark").split(",").map(Number);
    for (let q = 0; q < size; q++) for (let k = 0; k <= q; k++) {
      const at = 4 * (q * size + k);
      image.data.set([red, green, blue, 255 * Math.sqrt(value(q, k) || 0)], at);
    }
    context.putImageData(image, 0, 0);
  }

  matrix() {
    const canvas = this.get("matrix"), name = this.matrixName();
    const rows = this.arrays[name].shape[2];
    const shown = `${name}|${this.state.text}|${this.state.layer}|${this.state.head}`;
    if (this.painted !== shown) {
      this.buffer = Object.assign(document.createElement("canvas"), { width: rows, height: rows });
      this.paint(this.buffer, (q, k) => this.weight(name, Number(this.state.layer), this.state.head, q, k), rows);
      this.painted = shown;
    }
    const context = canvas.getContext("2d"), scale = canvas.width / rows;
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.buffer, 0, 0, canvas.width, canvas.height);
    const row = name === "meta_attention" ? this.metaColumns.indexOf(this.query) : this.query;
    if (row < 0) return;
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    context.strokeRect(0, row * scale, canvas.width, Math.max(1, scale));
    context.strokeRect(row * scale, 0, Math.max(1, scale), canvas.height);
  }
}

async function main() {
  drawAll();
  let drawnAt = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawAll(); } });
  const views = [...document.querySelectorAll("script.view-data")].map((node) => JSON.parse(node.textContent));
  let view = null;
  if (views.length) { view = new TokenView(document.getElementById("token-view"), views); await view.start(); }
  dark.addEventListener("change", () => { drawAll(); if (view) { view.painted = null; view.thumbnails(); view.render(); } });
  const download = document.getElementById("download");
  download.hidden = false;
  download.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("results").textContent], { type: "application/json" }));
    link.download = "results.json";
    link.click();
  });
  document.body.dataset.ready = "1";
}
main();
