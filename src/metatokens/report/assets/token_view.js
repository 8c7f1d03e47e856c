"use strict";
/* Token by token: one text, whatever is measured of it as the shade of its tokens, and the matrix of a head. */
const META_MARK = "\u25c6";
const DARKEST = 0.55; /* of a shade, so that the text on it keeps a contrast of 4.5 */
const whole = (text, end) => (text !== null && /^\d+$/.test(String(text)) && Number(text) < end ? Number(text) : null);
const range = (end) => Array.from({ length: end }, (_, i) => i);
const mean = (values, of) => values.reduce((sum, value) => sum + of(value), 0) / values.length;
const known = (x) => (Number.isNaN(x) ? null : x);
const TYPED = { uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array, float32: Float32Array };
const MOST_PLANES = 6; /* kept: 4 MB each at 2,048 tokens */
const LOGIT_NOTE = "of a layer adds to the logit of a token, over the mean logit of the vocabulary, where the token is predicted. It stands at the token itself.";

/* What can be shown: its name, the arrays one of which it needs, whether it has layers, heads, and is of a query. */
const QUANTITIES = {
  attention: { name: "attention of a head", needs: ["attention", "attention_keys"], layers: true, heads: true, query: true },
  received: { name: "attention received", needs: ["received_attention"], layers: true, heads: true, note: "The mean weight that a token gets from itself and the tokens behind it." },
  meta_attention: { name: "meta-attention", needs: ["meta_attention"], layers: true, heads: true, query: true },
  cosine_centred: { name: "cosine with earlier tokens, centred", needs: ["cosine_centred"], layers: true, query: true },
  cosine_raw: { name: "cosine with earlier tokens, raw", needs: ["cosine_raw"], layers: true, query: true },
  loss: { name: "loss: without minus with meta-tokens", needs: ["loss_without"], unit: "nats" },
  logit_attention: { name: "logit added by attention", needs: ["logit_attention"], layers: true, unit: "logits", note: `What the attention ${LOGIT_NOTE}` },
  logit_meta_attention: { name: "logit added by meta-attention", needs: ["logit_meta_attention"], layers: true, unit: "logits", note: `What the meta-attention ${LOGIT_NOTE}` },
  logit_mlp: { name: "logit added by the feed-forward part", needs: ["logit_mlp"], layers: true, unit: "logits", note: `What the feed-forward part ${LOGIT_NOTE}` },
  patch_effect: { name: "patch effect", needs: ["patch_effect"], layers: true, note: "The prompt with another item is run with the state of one token taken from this prompt: the share of the logit difference that comes back, 1 for all of it. The state is the one before the chosen layer." },
};

function decompress(gzip) {
  const bytes = Uint8Array.from(atob(gzip), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

async function unpack({ shape, dtype, gzip }) {
  return { shape, data: new TYPED[dtype](await decompress(gzip).arrayBuffer()) };
}

/* The largest byte of each block, (size, size), so that a weight alone in its block is seen. */
function pool(plane, rows, size) {
  if (size === rows) return plane;
  const pooled = new Uint8Array(size * size), at = Array.from({ length: rows }, (_, i) => Math.floor((i * size) / rows));
  for (let q = 0; q < rows; q++) for (let k = 0; k <= q; k++) {
    const value = plane[q * rows + k], place = at[q] * size + at[k];
    if (value > pooled[place]) pooled[place] = value;
  }
  return pooled;
}

class TokenView {
  constructor(root, texts) {
    this.root = root; this.texts = texts; this.pinned = null; this.query = 0; this.planes = new Map();
    this.state = { text: 0, quantity: null, layer: 0, head: "mean", meta: 1 };
    this.get = (id) => document.getElementById(id);
  }

  async start() {
    this.state.text = Number(this.get("view-text").value);
    this.open();
    this.readHash();
    for (const [id, key] of [["view-text", "text"], ["view-quantity", "quantity"], ["view-layer", "layer"], ["view-head", "head"]]) {
      this.get(id).addEventListener("change", async (event) => { await this.change(key, event.target.value); });
    }
    this.get("view-meta").addEventListener("change", (event) => this.change("meta", event.target.checked ? 1 : 0));
    const strip = this.get("strip");
    strip.addEventListener("pointerover", (e) => this.point(e.target.dataset?.index));
    strip.addEventListener("click", (e) => this.pin(e.target.dataset?.index));
    strip.addEventListener("keydown", (e) => this.key(e));
    this.get("matrix").addEventListener("pointermove", (e) => { this.point(this.tokenAt(e)); this.reveal(); });
    this.get("matrix").addEventListener("click", (e) => { this.pin(this.tokenAt(e)); this.reveal(); });
    this.get("heads").addEventListener("keydown", (e) => this.moveHead(e));
    addEventListener("hashchange", async () => { if (location.hash.includes("=")) { this.readHash(); await this.load(); this.render(); this.reveal(); } });
    await this.load();
    this.root.hidden = false;
    this.render();
    this.reveal();
    // who follows a link to a view wants to see it; who reloads stays where they were
    if (location.hash.includes("=") && performance.getEntriesByType("navigation")[0]?.type === "navigate") this.get("tokens").scrollIntoView();
  }

  /* At the answer, in the head that reads most from meta-tokens. */
  open() {
    const { query, layer, head } = this.texts[Number(this.state.text)].opening;
    this.query = query;
    Object.assign(this.state, { layer, head });
  }

  readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const [key, value] of given) if (Object.hasOwn(this.state, key)) this.state[key] = value;
    this.query = whole(given.get("query"), Infinity) ?? this.query;
    this.pinned = whole(given.get("pinned"), Infinity);
    this.state.text = whole(this.state.text, this.texts.length) ?? 0;
  }

  /* An address can be written by hand, or for another page; and not every quantity has the same layers and heads. */
  repair() {
    if (!this.available.includes(this.state.quantity)) this.state.quantity = this.available[0];
    const { quantity } = this.state, shown = QUANTITIES[quantity], sites = quantity === "patch_effect";
    const numLayers = this.numLayers + (sites ? 1 : 0);
    this.state.layer = whole(this.state.layer, numLayers) ?? 0;
    const head = whole(this.state.head, this.numHeads), heads = this.headsOf(this.state.layer);
    this.state.head = heads.includes(head) ? head : "mean";
    this.state.meta = whole(this.state.meta, 2) ?? 1;
    this.query = Math.min(this.query, this.count - 1);
    if (this.pinned !== null && this.pinned >= this.count) this.pinned = null;
    this.fill("view-layer", range(numLayers).map((i) => [i, sites && i === this.numLayers ? "after the last" : i]), Boolean(shown.layers));
    this.fill("view-head", [["mean", "mean"], ...heads.map((i) => [i, i])], Boolean(shown.heads));
  }

  /* Of a long text, attention is there for some heads only. */
  headsOf(layer, quantity = this.state.quantity) {
    if (this.arrays.attention || quantity === "received" || quantity === "meta_attention") return range(this.numHeads);
    const { shape: [, kept], data } = this.arrays.attention_heads, row = Math.min(layer, this.numLayers - 1);
    return [...data.subarray(row * kept, (row + 1) * kept)];
  }

  /* The row of the matrix under the pointer, as the index of its token. */
  tokenAt(event) {
    const box = event.target.getBoundingClientRect(), { name, rows } = this.shownMatrix();
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    return name === "meta_attention" ? this.metaColumns[row] : row;
  }

  /* Which matrix stands beside the text: that of the chosen quantity if it is one of attention, else of attention. */
  shownMatrix() {
    const name = this.state.quantity === "meta_attention" ? "meta_attention" : "attention";
    const layer = Math.min(this.state.layer, this.numLayers - 1);
    const head = this.headsOf(layer, name).includes(this.state.head) ? this.state.head : "mean";
    return { name, layer, head, rows: name === "attention" ? this.count : this.arrays[name].shape[2] };
  }

  moveHead(event) {
    const buttons = [...this.get("heads").children], at = buttons.indexOf(event.target), below = this.headsOf(0, "attention").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: below, ArrowUp: -below }[event.key];
    if (!step || at < 0) return;
    event.preventDefault();
    const next = buttons[at + step];
    if (next) { next.focus(); next.click(); }
  }

  writeHash() {
    const state = new URLSearchParams({ ...this.state, query: this.query, ...(this.pinned === null ? {} : { pinned: this.pinned }) });
    history.replaceState(null, "", `#${state}`);
  }

  async change(key, value) {
    this.state[key] = value;
    // there is one more state than there are layers
    if (key === "quantity" && value !== "patch_effect") this.state.layer = Math.min(this.state.layer, this.numLayers - 1);
    if (key === "text") { this.pinned = null; this.open(); await this.load(); }
    this.render();
    this.writeHash();
  }

  async load() {
    this.view = this.texts[Number(this.state.text)];
    this.count = this.view.tokens.length;
    this.arrays = Object.fromEntries(await Promise.all(Object.entries(this.view.arrays).map(async ([name, packed]) => [name, await unpack(packed)])));
    this.planes.clear(); this.painted = null;
    this.decimals = this.arrays.attention ? 3 : 4; // weights of long texts are small
    const attention = this.arrays.attention || this.arrays.received_attention;
    [this.numLayers, this.numHeads] = attention.shape;
    this.available = Object.keys(QUANTITIES).filter((name) => QUANTITIES[name].needs.some((array) => this.arrays[array]));
    this.fill("view-quantity", this.available.map((name) => [name, QUANTITIES[name].name]));
    this.metaIndex = this.view.is_meta.flatMap((meta, i) => (meta ? [i] : []));
    this.metaColumns = [...(this.arrays.meta_attention_tokens?.data ?? this.metaIndex)];
    this.metaRows = new Map(this.metaColumns.map((token, row) => [token, row]));
    this.repair(); this.strip(); this.thumbnails();
  }

  fill(id, options, applies = true) {
    const select = this.get(id), made = JSON.stringify(options);
    select.disabled = !applies;
    select.title = applies ? "" : "what is shown is the same for all of them";
    if (select.dataset.made === made) return;
    select.dataset.made = made;
    select.replaceChildren(...options.map(([value, text]) => Object.assign(document.createElement("option"), { value, textContent: text })));
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
    const box = this.get("heads"), size = Math.min(32, this.count);
    box.style.gridTemplateColumns = `repeat(${this.headsOf(0, "attention").length}, 34px)`;
    box.replaceChildren(...range(this.numLayers).flatMap((layer) => this.headsOf(layer, "attention").map((head) => {
      const button = document.createElement("button");
      button.type = "button"; button.dataset.layer = layer; button.dataset.head = head;
      button.setAttribute("aria-label", `layer ${layer}, head ${head}`); button.title = `layer ${layer}, head ${head}`;
      const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
      this.paint(canvas, this.plane("attention", layer, head), this.count);
      button.append(canvas);
      button.addEventListener("click", () => { this.state.quantity = "attention"; this.state.layer = layer; this.change("head", String(head)); });
      return button;
    })));
  }

  /* The matrix of a head, or of the mean over all heads, as bytes round(255 sqrt(weight)), row = query; every use of
     attention goes through here. A view into the array where all is there, else filled in from the largest weights. */
  plane(name, layer, head) {
    const array = this.arrays[name], at = `${name}|${layer}|${head}`;
    if (array && head !== "mean") {
      const [, numHeads, rows] = array.shape, start = (layer * numHeads + Number(head)) * rows * rows;
      return array.data.subarray(start, start + rows * rows);
    }
    const plane = this.planes.get(at) ?? (array ? this.meanPlane(name, layer) : this.sparsePlane(layer, head));
    this.planes.delete(at);
    this.planes.set(at, plane); // the latest last
    if (this.planes.size > MOST_PLANES) this.planes.delete(this.planes.keys().next().value);
    return plane;
  }

  meanPlane(name, layer) {
    const [, numHeads, rows] = this.arrays[name].shape, sum = new Float32Array(rows * rows);
    for (let head = 0; head < numHeads; head++) {
      const plane = this.plane(name, layer, head);
      for (let i = 0; i < sum.length; i++) sum[i] += plane[i] * plane[i];
    }
    return Uint8Array.from(sum, (squares) => Math.round(Math.sqrt(squares / numHeads)));
  }

  sparsePlane(layer, head) {
    const { shape: [, numPlanes, rows, kept], data: keys } = this.arrays.attention_keys, weights = this.arrays.attention_weights.data;
    const place = head === "mean" ? 0 : 1 + this.headsOf(layer, "attention").indexOf(Number(head));
    const plane = new Uint8Array(rows * rows), start = (layer * numPlanes + place) * rows * kept;
    // a row with fewer keys is filled up with weights of 0, which must not overwrite one
    for (let i = 0; i < rows * kept; i++) if (weights[start + i]) plane[Math.floor(i / kept) * rows + keys[start + i]] = weights[start + i];
    return plane;
  }

  /* What every token has for a query; null where there is nothing. */
  values(query) {
    const { quantity, layer, head } = this.state, tokens = range(this.count);
    const weight = (byte) => (byte || this.arrays.attention ? (byte / 255) ** 2 : null); /* 0 of a long text: not kept */
    switch (quantity) {
      case "attention": {
        const plane = this.plane("attention", layer, head);
        return tokens.map((k) => (k > query ? null : weight(plane[query * this.count + k])));
      }
      case "meta_attention": {
        const plane = this.plane("meta_attention", layer, head), q = this.metaRows.get(query);
        return tokens.map((key) => {
          const k = this.metaRows.get(key);
          return q === undefined || k === undefined || k > q ? null : (plane[q * this.metaColumns.length + k] / 255) ** 2;
        });
      }
      case "received": {
        const heads = head === "mean" ? range(this.numHeads) : [Number(head)], { data } = this.arrays.received_attention;
        return tokens.map((k) => mean(heads, (h) => data[(layer * this.numHeads + h) * this.count + k]));
      }
      case "cosine_raw":
      case "cosine_centred": {
        const { data } = this.arrays[quantity], start = (layer * this.count + query) * this.count;
        return tokens.map((k) => (k > query ? null : data[start + k] / 127));
      }
      case "loss": return tokens.map((k) => known(this.arrays.loss_without.data[k] - this.arrays.loss_with.data[k]));
      default: return tokens.map((k) => known(this.arrays[quantity].data[layer * this.count + k]));
    }
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
      if (next >= 0 && next < this.count) { this.choose(next); this.reveal(); }
    } else if (event.key === "Enter" || event.key === " ") this.pin(this.query);
    else if (event.key === "Escape") { this.pinned = null; this.render(); this.writeHash(); }
    else return;
    event.preventDefault();
  }

  /* Scrolls the query of a long text into its box, and the page not at all. */
  reveal() {
    const strip = this.get("strip"), span = strip.children[this.query], top = span.offsetTop - strip.offsetTop;
    if (top < strip.scrollTop || top + span.offsetHeight > strip.scrollTop + strip.clientHeight) strip.scrollTop = top - strip.clientHeight / 2;
  }

  choose(index) { this.query = index; this.shade(); this.writeHash(); }

  render() {
    this.repair();
    for (const [id, key] of [["view-text", "text"], ["view-quantity", "quantity"], ["view-layer", "layer"], ["view-head", "head"]]) this.get(id).value = String(this.state[key]);
    this.get("view-meta").checked = Boolean(Number(this.state.meta));
    this.get("strip").classList.toggle("no-meta", !Number(this.state.meta));
    for (const button of this.get("heads").children) button.setAttribute("aria-pressed", String(button.dataset.layer === String(this.state.layer) && button.dataset.head === String(this.state.head)));
    // one stop for Tab; arrow keys move among the heads
    const stop = this.get("heads").querySelector("[aria-pressed=true]") || this.get("heads").firstElementChild;
    for (const button of this.get("heads").children) button.tabIndex = button === stop ? 0 : -1;
    this.get("view-note").textContent = [QUANTITIES[this.state.quantity].note, this.leftOut()].filter(Boolean).join(" ");
    this.shade();
  }

  /* What a long text lacks. */
  leftOut() {
    if (this.arrays.attention) return "";
    const { attention_keys: { shape }, meta_attention, logit_meta_attention } = this.arrays;
    const also = logit_meta_attention && !meta_attention ? " and meta-attention" : "";
    return `This text is long. Of a row of attention its ${shape[3]} largest weights are kept, for the mean over heads and for ${shape[1] - 1} heads a layer: those whose log-odds of the mass on meta-tokens are farthest from 0. Cosines${also} are left out.`;
  }

  shade() {
    const values = this.values(this.query);
    const most = Math.max(...values.map((v) => (v === null ? 0 : Math.abs(v)))) || 1;
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
    const signs = values.some((v) => v < 0) ? "blue is above 0, orange below" : "blue is above 0";
    this.get("view-scale").textContent = values.some((v) => v) ? `Shades: ${signs}, the darkest ${this.number(most)}.` : "";
    this.tip(values);
    this.matrix();
  }

  number(value) {
    const { unit } = QUANTITIES[this.state.quantity];
    return value === null ? "n/a" : `${value.toFixed(this.decimals)}${unit ? ` ${unit}` : ""}`;
  }

  name(k) { return this.view.is_meta[k] ? `meta-token ${this.metaIndex.indexOf(k) + 1}` : JSON.stringify(this.view.tokens[k]); }

  tip(values) {
    const best = range(this.count).filter((k) => values[k] !== null).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b).slice(0, 4);
    const parts = best.map((k) => `${this.name(k)} at ${k}: ${values[k].toFixed(this.decimals)}`).join(", ");
    const about = QUANTITIES[this.state.quantity].query ? `${parts || "Nothing to show here."}${this.compared(values, best)}` : `${this.own(values)} Largest: ${parts || "none"}.`;
    this.get("tip").textContent = `${this.name(this.query)} at ${this.query}. ${about}`;
  }

  /* The number of the token itself, and of the pinned one, where a quantity is of a token and not of a query. */
  own(values) {
    const whole = this.state.quantity.startsWith("logit_") && this.arrays.logit ? known(this.arrays.logit.data[this.query]) : null;
    const pinned = this.pinned === null || this.pinned === this.query ? "" : `; pinned ${this.name(this.pinned)} at ${this.pinned}: ${this.number(values[this.pinned])}`;
    return `Here ${this.number(values[this.query])}${whole === null ? "" : ` of ${whole.toFixed(this.decimals)} in all`}${pinned}.`;
  }

  /* The same keys for the pinned query, and what the later of the two gives the earlier. */
  compared(values, keys) {
    if (this.pinned === null || this.pinned === this.query) return "";
    const show = (value) => (value === null ? "n/a" : value.toFixed(this.decimals)), ofPinned = this.values(this.pinned);
    const [early, late] = [this.pinned, this.query].sort((a, b) => a - b);
    return `; of pinned ${this.name(this.pinned)} at ${this.pinned}: ${keys.map((k) => show(ofPinned[k])).join(", ")}; from ${late} to ${early}: ${show((late === this.query ? values : ofPinned)[early])}`;
  }

  /* As dark as the root of the weight; of a long text, whose weights are small, as its fourth root. */
  paint(canvas, plane, rows) {
    const size = canvas.width, context = canvas.getContext("2d"), image = context.createImageData(size, size), bytes = pool(plane, rows, size);
    const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--mark").split(",").map(Number);
    for (let i = 0; i < bytes.length; i++) {
      image.data[4 * i] = red; image.data[4 * i + 1] = green; image.data[4 * i + 2] = blue;
      image.data[4 * i + 3] = this.arrays.attention ? bytes[i] : Math.sqrt(255 * bytes[i]);
    }
    context.putImageData(image, 0, 0);
  }

  matrix() {
    const canvas = this.get("matrix"), { name, layer, head, rows } = this.shownMatrix();
    const shown = `${name}|${this.state.text}|${layer}|${head}`;
    if (this.painted !== shown) {
      const size = Math.min(rows, canvas.width);
      this.buffer = Object.assign(document.createElement("canvas"), { width: size, height: size });
      this.paint(this.buffer, this.plane(name, layer, head), rows);
      this.painted = shown;
      this.get("matrix-caption").textContent = `${name === "attention" ? "Attention" : "Meta-attention"}, layer ${layer}, ${head === "mean" ? "mean over heads" : `head ${head}`}: queries down, keys across; as dark as the ${this.arrays.attention ? "" : "fourth "}root of the weight.`;
    }
    const context = canvas.getContext("2d"), scale = canvas.width / rows;
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.buffer, 0, 0, canvas.width, canvas.height);
    const row = name === "meta_attention" ? this.metaRows.get(this.query) : this.query;
    if (row === undefined) return;
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    context.strokeRect(0, row * scale, canvas.width, Math.max(1, scale));
    context.strokeRect(row * scale, 0, Math.max(1, scale), canvas.height);
  }
}
