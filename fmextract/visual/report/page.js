"use strict";
// The whole page is drawn from the data block. What a file says is only ever set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const VIEWS = { run: "Run", layers: "Layers", maps: "Maps", channels: "Channels" };
const mapRows = Object.keys(data.maps).map(Number).sort((a, b) => a - b);
const mapLayers = data.layers.filter((layer, i) => mapRows.some((row) => data.maps[row][i]));
const channelLayers = data.layers.filter((layer) => layer.channels);

// ------------------------------------------------------------------------------------------------ words and numbers

const number = (v, digits = 3) => {
  if (v === null || v === undefined || Number.isNaN(v)) return "–";
  const size = Math.abs(v);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return v.toExponential(digits - 1).replace("e+", "e").replace("-", "−");
  return String(Number(v.toPrecision(digits))).replace("-", "−");
};
const share = (v) => (v === null || v === undefined || Number.isNaN(v) ? "–" : v === 0 ? "0" :
  v >= 0.0095 ? `${(100 * v).toFixed(1)} %` : `${Number((100 * v).toPrecision(2))} %`);
const bytes = (n) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1000 && i < 4) { n /= 1024; i += 1; }
  return `${i === 0 || n >= 100 ? Math.round(n) : n.toFixed(1)} ${units[i]}`;
};
const sizeChange = (before, after) => {
  const ratio = (Math.max(before, after) / Math.max(1, Math.min(before, after))).toFixed(1);
  return ratio === "1.0" ? "no smaller" : `${ratio} times ${after < before ? "smaller" : "larger"}`;
};
const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const keyOf = (row) => data.keys[row] ?? `row ${row}`;
const indexOf = (layer) => data.layers.indexOf(layer);

// --------------------------------------------------------------------------------------------------------- elements

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "css") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const s = (tag, props, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

const tipBox = document.getElementById("tip");
function showTip(text, x, y) {
  tipBox.textContent = text;
  tipBox.hidden = false;
  const { width, height } = tipBox.getBoundingClientRect();
  tipBox.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tipBox.style.top = `${y + 18 + height > innerHeight ? y - height - 10 : y + 18}px`;
}
const hideTip = () => { tipBox.hidden = true; };
function tipped(node, text) {
  node.addEventListener("pointermove", (e) => showTip(text, e.clientX, e.clientY));
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("focus", () => {
    if (!node.matches(":focus-visible")) return;
    const at = node.getBoundingClientRect();
    showTip(text, at.left + at.width / 2, at.top);
  });
  node.addEventListener("blur", hideTip);
  return node;
}

// ------------------------------------------------------------------------------------------------------------ state

const DEFAULTS = { view: "run", layer: null, row: null, channel: null, scale: "own", overlay: "on", opacity: "0.5", metric: null };
let state = {};

function readHash() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) if (asked.has(name)) state[name] = asked.get(name);
  if (!(state.view in VIEWS)) state.view = "run";
}
function hashOf(changes) {
  const next = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...state, ...changes })) {
    if (value !== null && String(value) !== DEFAULTS[name]) next.set(name, value);
  }
  return `#${next}`;
}
function go(changes, quietly = false) {
  const hash = hashOf(changes);
  if (quietly) {
    history.replaceState(null, "", hash);
    readHash();
  } else if (hash !== (location.hash || "#")) {
    location.hash = hash;
  }
}

const pick = (list) => list.find((layer) => layer.name === state.layer) ?? null;
/** The layer that a view shows: the chosen one if the view can show it, else one in the middle of the network. */
const layerFor = (list) => pick(list) ?? list[Math.floor(list.length / 2)] ?? null;
const rowNow = () => (mapRows.includes(Number(state.row)) && state.row !== null ? Number(state.row) : mapRows[0] ?? null);

// ------------------------------------------------------------------------------------------------- maps and colours

// Magma, seventeen colours of it: dark is the lowest value, light the highest.
const STOPS = "0000040a08221d114736106b51127c6a1c818326819c2e7fb73779d0416fe75263f56b5cfc8961fea772fec488fde2a3fcfdbf";
const LUT = (() => {
  const stops = STOPS.match(/../g).map((two) => parseInt(two, 16));
  const table = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i += 1) {
    const at = (i / 255) * 16, low = Math.min(15, Math.floor(at));
    for (let c = 0; c < 3; c += 1) table[3 * i + c] = stops[3 * low + c] + (at - low) * (stops[3 * low + 3 + c] - stops[3 * low + c]);
  }
  return table;
})();

let pending = 0;
const began = () => { pending += 1; document.body.dataset.ready = "no"; };
const ended = () => { pending -= 1; if (pending === 0) document.body.dataset.ready = "yes"; };

const pictures = new Map();
/** A decoded picture of the page; the promise is kept, so that each is decoded once. */
function picture(url) {
  if (!pictures.has(url)) {
    const image = new Image();
    image.src = url;
    pictures.set(url, image.decode().then(() => image));
    if (pictures.size > 400) pictures.delete(pictures.keys().next().value);
  }
  return pictures.get(url);
}
async function withPicture(url, draw) {
  began();
  try { draw(await picture(url)); } finally { ended(); }
}

/** The levels of all maps of one image in a layer: draw(levels, columns, width of the sprite). */
function withMaps(entry, view, draw) {
  withPicture(`data:image/png;base64,${entry.png}`, (image) => {
    const canvas = h("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    draw(context.getImageData(0, 0, image.width, image.height).data, image.width / view.drawn[1], image.width);
  });
}
/** The level of cell (y, x) of map i; 0 is a hole. */
function levelAt(levels, columns, width, view, i, y, x) {
  const [tall, wide] = view.drawn;
  return levels[4 * ((Math.floor(i / columns) * tall + y) * width + (i % columns) * wide + x)];
}
const valueOf = (level, low, high) => (level === 0 ? null : low + ((level - 1) / 254) * (high - low));

function paint(canvas, levels, columns, width, entry, view, i, range) {
  const [tall, wide] = view.drawn;
  canvas.width = wide;
  canvas.height = tall;
  const context = canvas.getContext("2d");
  const made = context.createImageData(wide, tall);
  const span = range[1] - range[0] || 1;
  for (let y = 0; y < tall; y += 1) {
    for (let x = 0; x < wide; x += 1) {
      const value = valueOf(levelAt(levels, columns, width, view, i, y, x), entry.low[i], entry.high[i]);
      if (value === null) continue; // a hole stays transparent
      const at = 3 * Math.max(0, Math.min(255, Math.round((255 * (value - range[0])) / span)));
      made.data.set([LUT[at], LUT[at + 1], LUT[at + 2], 255], 4 * (y * wide + x));
    }
  }
  context.putImageData(made, 0, 0);
}
function colourBar() {
  const canvas = h("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const made = context.createImageData(256, 1);
  for (let i = 0; i < 256; i += 1) made.data.set([LUT[3 * i], LUT[3 * i + 1], LUT[3 * i + 2], 255], 4 * i);
  context.putImageData(made, 0, 0);
  return canvas;
}

// --------------------------------------------------------------------------------------------------------- geometry

const inputOf = (row) => data.photos[row]?.size ?? data.input;

/** [y0, x0, y1, x1] of `size` around a cell's centre in the input, clipped to it. */
function around(field, size, cell, input) {
  const edges = [0, 1].map((axis) => {
    const centre = field.offset[axis] + cell[axis] * field.stride[axis];
    return [-1, 1].map((sign) => Math.max(0, Math.min(input[axis], centre + (sign * size[axis]) / 2)));
  });
  return [edges[0][0], edges[1][0], edges[0][1], edges[1][1]];
}
/** What a cell of a layer saw of the input: { centre, field, use }, boxes null where they are not known. */
function seen(layer, cell, input) {
  const { field, view, erf } = layer;
  if (view.kind === "tokens" || !field) {
    const patch = [input[0] / view.cells[0], input[1] / view.cells[1]];
    const box = [cell[0] * patch[0], cell[1] * patch[1], (cell[0] + 1) * patch[0], (cell[1] + 1) * patch[1]];
    const centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2];
    return { centre, field: null, use: view.kind === "tokens" ? box : null };
  }
  const centre = [0, 1].map((axis) => Math.max(0, Math.min(input[axis], field.offset[axis] + cell[axis] * field.stride[axis])));
  const whole = [0, 0, input[0], input[1]];
  return { centre, field: field.whole ? whole : around(field, field.size, cell, input), use: erf ? around(field, erf, cell, input) : null };
}
const covers = (box, input) => ((box[2] - box[0]) * (box[3] - box[1])) / (input[0] * input[1]);

function marks(where, input) {
  const rect = (box, kind) => ["under", ""].map((under) => s("rect", {
    class: `box ${kind} ${under}`, x: box[1], y: box[0], width: box[3] - box[1], height: box[2] - box[0] }));
  const made = s("svg", { viewBox: `0 0 ${input[1]} ${input[0]}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const main = where.use ?? where.field;
  if (where.use && where.field && covers(where.field, input) < 0.98) made.append(...rect(where.field, "field"));
  if (main) made.append(...rect(main, "main"));
  if (!main || covers(main, input) > 0.7) {
    const radius = Math.max(...input) / 24;
    made.append(...["under", ""].map((under) => s("circle", { class: `ring ${under}`, cy: where.centre[0], cx: where.centre[1], r: radius })));
  }
  return made;
}

function photo(row, ...over) {
  const input = inputOf(row);
  const held = data.photos[row];
  const made = h("div", { class: "frame" },
    held ? h("img", { src: `data:image/jpeg;base64,${held.jpeg}`, alt: keyOf(row) })
      : h("div", { class: "none" }, "the photo is not in this report"), ...over);
  made.style.aspectRatio = input ? `${input[1]} / ${input[0]}` : "1";
  return made;
}

// ----------------------------------------------------------------------------------------------------------- charts

const METRICS = {
  zeros: ["share of zeros", (l) => l.stats.zeros, share],
  near: ["near zero", (l) => l.stats.near, share],
  dimension: ["effective dimension", (l) => l.stats.dimension, number],
  dead: ["dead channels", (l) => (l.stats.dead === null ? null : l.stats.dead / l.stats.channels), share],
  mean: ["mean", (l) => l.stats.mean, number],
  std: ["spread (std)", (l) => l.stats.std, number],
  error: ["error against fp32", (l) => l.rel_error, share],
  stored: ["bytes stored", (l) => l.bytes_stored, bytes],
};

function ticks(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const made = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) made.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return made;
}

function depthPlot(metric) {
  const [title, get, show] = METRICS[metric];
  const values = data.layers.map(get);
  const known = values.filter((v) => v !== null && v !== undefined);
  if (!known.length) return h("p", { class: "note" }, `The file does not hold: ${title}.`);
  const n = values.length, wide = 1160, tall = 250, left = 66;
  const low = Math.min(0, ...known), high = Math.max(...known, low + 1e-12, show === share ? 0.01 : -Infinity);
  const x = (i) => left + ((wide - left) * (i + 0.5)) / n;
  const y = (v) => 12 + ((tall - 12) * (high - v)) / (high - low);
  const bar = Math.min(46, ((wide - left) / n) * 0.66);
  const long = Math.max(...data.layers.map((l) => Math.min(22, l.name.length)));
  const turned = n * (long * 6.4 + 10) > wide - left;
  const every = Math.max(1, Math.ceil((n * 15) / (wide - left)));
  const svg = s("svg", { class: "chart depth", viewBox: `0 0 ${wide} ${tall + (turned ? 12 + long * 5.2 : 26)}`, role: "group",
    "aria-label": `${title} by layer, in the order of execution` });
  for (const v of ticks(low, high)) {
    svg.append(s("line", { class: "axis", x1: left, x2: wide, y1: y(v), y2: y(v) }),
      s("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, show(v)));
  }
  const now = layerFor(data.layers);
  data.layers.forEach((layer, i) => {
    const v = values[i];
    const name = layer.name.length > 22 ? `${layer.name.slice(0, 10)}…${layer.name.slice(-11)}` : layer.name;
    const group = s("g", { class: `pick${layer === now && state.layer ? " now" : ""}`, tabindex: "0", role: "link", "data-id": `depth-${i}`,
      "aria-label": `${layer.name}: ${title} ${show(v)}`,
      onclick: () => go({ view: "layers", layer: layer.name }),
      onkeydown: (e) => { if (e.key === "Enter") go({ view: "layers", layer: layer.name }); } });
    group.append(s("rect", { class: "hit", x: x(i) - (wide - left) / n / 2, y: 0, width: (wide - left) / n, height: tall }));
    if (v !== null && v !== undefined) {
      group.append(s("rect", { class: "mark", x: x(i) - bar / 2, width: bar, y: Math.min(y(0), y(v)), height: Math.max(1, Math.abs(y(v) - y(0))), rx: Math.min(3, bar / 4) }));
    }
    if (i % every === 0) {
      group.append(turned
        ? s("text", { x: x(i) + 3, y: tall + 14, "text-anchor": "end", transform: `rotate(-52 ${x(i) + 3} ${tall + 14})` }, name)
        : s("text", { x: x(i), y: tall + 18, "text-anchor": "middle" }, name));
    }
    svg.append(tipped(group, `${layer.name}\n${title}: ${show(v)}`));
  });
  return svg;
}

function histogram(layer, wide, tall, axis) {
  const made = layer.histogram;
  if (!made || !made.counts.length) {
    return h("p", { class: "note" }, made ? "all sampled values are zero" : "no finite values");
  }
  const n = made.counts.length, most = Math.max(...made.counts, 1);
  const svg = s("svg", { class: axis ? "chart" : "spark", viewBox: `0 0 ${wide} ${tall + (axis ? 24 : 0)}`, role: "img",
    "aria-label": `histogram of ${layer.name}, ${number(made.low)} to ${number(made.high)}` });
  if (!axis) { svg.setAttribute("width", wide); svg.setAttribute("height", tall); }
  made.counts.forEach((count, i) => {
    const height = (tall * count) / most;
    if (!count) return;
    const rect = s("rect", { class: "bars", x: (wide * i) / n, width: Math.max(0.5, wide / n - (axis ? 1 : 0.2)), y: tall - height, height });
    const from = made.low + ((made.high - made.low) * i) / n, to = made.low + ((made.high - made.low) * (i + 1)) / n;
    svg.append(axis ? tipped(rect, `${number(from)} to ${number(to)}\n${plural(count, "value")}`) : rect);
  });
  if (axis) {
    svg.append(s("line", { class: "axis", x1: 0, x2: wide, y1: tall, y2: tall }));
    for (const v of ticks(made.low, made.high)) {
      const at = (wide * (v - made.low)) / (made.high - made.low);
      const anchor = at < 10 ? "start" : at > wide - 10 ? "end" : "middle";
      svg.append(s("text", { x: at, y: tall + 17, "text-anchor": anchor }, number(v)));
    }
  }
  return svg;
}

// ------------------------------------------------------------------------------------------------------------ parts

function layerSelect(list, label = "Layer") {
  const now = layerFor(list);
  return h("label", {}, label, h("select", { "data-id": "layer", onchange: (e) => go({ layer: list[e.target.selectedIndex].name, channel: null }) },
    list.map((layer) => h("option", { selected: layer === now }, layer.name))));
}
const toggles = (label, now, options, choose) => h("div", { class: "label", role: "group", "aria-label": label }, label,
  h("div", { class: "group" }, Object.entries(options).map(([value, text]) =>
    h("button", { type: "button", "data-id": `${label}-${value}`, "aria-pressed": String(value === now), onclick: () => choose(value) }, text))));
const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter((pair) => pair[1] !== null && pair[1] !== "")
  .map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
const figures = (pairs) => h("dl", { class: "figures" }, pairs.filter(Boolean)
  .map(([name, value, small]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, small ? h("small", {}, small) : null))));
const sees = (layer) => {
  if (!layer.field) return null;
  if (layer.field.whole) return "whole image";
  return `${layer.field.bound ? "≤ " : ""}${layer.field.size.map((v) => number(v, 4)).join("×")} px`;
};

// ------------------------------------------------------------------------------------------------------------ views

const nearSaid = (sampled) => `At most 1 % of the layer's root mean square, zeros included${sampled ? "; where the run did not count them, in a sample of the stored values" : ""}`;
const dimensionSaid = "In how many directions the images differ: the participation ratio of the covariance of each image's channel means."
  + " It is at most the number of channels, and of images less one.";

function dimension(stats) {
  return stats.dimension === null ? "–" : `${stats.dimension_estimated ? "~" : ""}${number(stats.dimension, 3)}`;
}

function drawRun() {
  const { run } = data;
  const errors = data.layers.map((l) => l.rel_error).filter((v) => v);
  const offered = Object.fromEntries(Object.entries(METRICS).filter(([k, m]) => data.layers.some((l) => (m[1](l) ?? null) !== null) && (k !== "error" || errors.length)).map(([k, m]) => [k, m[0]]));
  // Where nothing is zero (no ReLU among the layers), the spread says more.
  const telling = data.layers.some((l) => l.stats.zeros >= 0.01) ? "zeros" : "std";
  const metric = [state.metric, telling].find((one) => one in offered) ?? Object.keys(offered)[0];
  const failed = data.failures.length > 0;
  return [
    figures([
      ["images", run.rows.toLocaleString("en"), run.failed ? `${run.failed.toLocaleString("en")} failed` : "none failed"],
      ["layers", String(data.layers.length)],
      ["values", bytes(run.bytes_raw)],
      ["on disk", bytes(run.bytes_stored), run.bytes_stored ? sizeChange(run.bytes_raw, run.bytes_stored) : ""],
      run.precision && ["precision", run.precision],
      errors.length && ["largest error against fp32", share(Math.max(...errors))],
    ]),
    h("div", { class: "card" },
      h("div", { class: "bar" }, h("div", { css: { flex: "1 1 12rem" } }, h("h2", {}, "By depth"),
        h("p", { class: "note" }, `Layers in the order of execution: ${offered[metric] ?? ""}. A bar leads to its layer.`)),
      h("div", { class: "noprint" }, toggles("Measure", metric, offered, (value) => go({ metric: value })))),
      h("div", { class: "scroll plot" }, depthPlot(metric)),
      metric === "near" ? h("p", { class: "note" }, `${nearSaid(data.layers.some((l) => l.stats.near_sampled))}.`) : null,
      metric === "dimension" ? h("p", { class: "note" }, dimensionSaid) : null,
      metric === "dead" ? h("p", { class: "note" }, "Channels that are zero everywhere, over all images.") : null),
    failed ? h("div", { class: "card" }, h("h2", {}, "Failed images"),
      h("p", { class: "note" }, `${plural(run.failed, "row")} of ${run.rows.toLocaleString("en")} without values: `,
        Object.entries(run.statuses).filter(([name, n]) => name !== "ok" && n).map(([name, n]) => `${n} ${name}`).join(", "), "."),
      h("div", { class: "scroll" }, h("table", { id: "failures" },
        h("thead", {}, h("tr", {}, h("th", { class: "n" }, "row"), h("th", {}, "image"), h("th", {}, "what"), h("th", {}, "message"))),
        h("tbody", {}, data.failures.map((f) => h("tr", {}, h("td", { class: "n" }, String(f.row)), h("td", { class: "break mono" }, f.key),
          h("td", {}, f.status), h("td", { class: "break" }, f.message))))))) : null,
    h("div", { class: "grid2" },
      h("div", { class: "card" }, h("h2", {}, "How it was made"), facts(run.facts.map(([k, v]) => [k, k === "source" || k === "weights" ? h("span", { class: "mono" }, v) : v]))),
      h("div", { class: "card" }, h("h2", {}, "Not in this report"),
        data.left_out.length ? h("ul", { class: "plain", id: "left-out" }, data.left_out.map((what) => h("li", {}, what)))
          : h("p", { class: "note" }, "Nothing was left out but the resolution of large maps."))),
  ];
}

function drawLayers() {
  const now = layerFor(data.layers);
  if (!now) return [h("p", { class: "note" }, "The file has no layers.")];
  const columns = [
    ["layer", (l) => [h("a", { href: hashOf({ layer: l.name, channel: null }), "data-id": `row-${indexOf(l)}` }, l.name), h("div", { class: "faint" }, [l.type, ...l.numbers].join(" · "))], "name"],
    ["shape", (l) => tipped(h("span", {}, l.shape.join("×")), l.axes.join(" × "))],
    ["values", (l) => histogram(l, 110, 26, false)],
    ["zeros", (l) => share(l.stats.zeros), "n"],
    ["near zero", (l) => share(l.stats.near), "n"],
    ["dimension", (l) => dimension(l.stats), "n"],
    ["mean ± std", (l) => `${number(l.stats.mean)} ± ${number(l.stats.std)}`, "n"],
    ["max", (l) => number(l.stats.max), "n"],
    ["dead", (l) => (l.stats.dead === null ? "–" : `${l.stats.dead} / ${l.stats.channels}`), "n"],
    ["not finite", (l) => h("span", { class: l.stats.nonfinite ? "bad" : null }, l.stats.nonfinite ? l.stats.nonfinite.toLocaleString("en") : "0"), "n"],
    ["sees", (l) => sees(l) ?? "–", "n"],
    ["error", (l) => share(l.rel_error), "n"],
    ["on disk", (l) => bytes(l.bytes_stored), "n"],
  ].filter(([name]) => !(name === "sees" && !data.layers.some((l) => l.field)) && !(name === "error" && data.layers.every((l) => !l.rel_error))
    && !(name === "dimension" && data.layers.every((l) => l.stats.dimension === null))
    && !(name === "not finite" && !data.layers.some((l) => l.stats.nonfinite)));
  const { stats, histogram: bins, view } = now;
  const told = bins ? [
    `${plural(bins.values, "stored value")} of ${plural(bins.rows, "image")}`,
    bins.zeros ? `${share(bins.zeros / bins.values)} of them exactly zero and not drawn` : "none exactly zero",
    bins.below + bins.above ? `${plural(bins.below + bins.above, "value")} outside the range drawn` : null,
  ].filter(Boolean).join("; ") : "";
  return [
    h("div", { class: "card", id: "detail" },
      h("div", { class: "bar" }, h("div", { css: { flex: "1 1 14rem" } }, h("h2", {}, now.name), h("p", { class: "note" },
        `${[now.type, ...now.numbers].join(" · ")}, ${now.shape.join("×")} (${now.axes.join(", ")})`)),
      h("div", { class: "group noprint" },
        mapLayers.includes(now) ? h("button", { type: "button", onclick: () => go({ view: "maps", layer: now.name }) }, "Its maps") : null,
        now.channels ? h("button", { type: "button", onclick: () => go({ view: "channels", layer: now.name }) }, "Its channels") : null)),
      h("div", { class: "grid2" },
        h("figure", {}, histogram(now, 460, 130, true), h("figcaption", { class: "note" }, told)),
        facts([
          ["module", h("span", { class: "mono" }, `${now.module}${now.calls > 1 ? `, call ${now.call} of ${now.calls}` : ""}${now.tap === "in" ? ", its input" : ""}`)],
          ["reduced by", now.reducer],
          ["computed in", `${now.compute_dtype}, stored as ${now.dtype}`],
          ["error against fp32", now.rel_error === null ? null : `${share(now.rel_error)} (relative L2)`],
          ["mean ± std", `${number(stats.mean, 4)} ± ${number(stats.std, 4)}`],
          ["range", `${number(stats.min, 4)} to ${number(stats.max, 4)}`],
          ["zeros", share(stats.zeros)],
          ["near zero", tipped(h("span", {}, `${share(stats.near)}${stats.near_sampled ? " (of a sample)" : ""}`), nearSaid(stats.near_sampled))],
          ["effective dimension", stats.dimension === null ? null : tipped(h("span", {},
            `${dimension(stats)} of at most ${Math.min(stats.channels, stats.dimension_rows - 1)}, over ${plural(stats.dimension_rows, "image")}${stats.dimension_estimated ? ", estimated" : ""}`), dimensionSaid)],
          ["dead channels", stats.dead === null ? null : `${stats.dead} of ${stats.channels}`],
          ["not finite", stats.nonfinite ? h("span", { class: "bad" }, plural(stats.nonfinite, "value")) : "none"],
          ["a cell sees", now.field ? `${sees(now)}${now.field.whole ? "" : `, one every ${now.field.stride.map((v) => number(v, 4)).join("×")} px`}${now.field.has_global ? ", and something of the whole image" : ""}` : null],
          ["it uses mostly", now.erf ? `${now.erf.map((v) => number(v, 4)).join("×")} px (90 % of the gradient)` : null],
          ["on disk", `${bytes(now.bytes_stored)} of ${bytes(now.bytes_raw)}`],
          ["", stats.sampled ? "The file keeps no statistics of this layer: these are of a sample." : ""],
          ["tokens", view.kind === "tokens" ? `${view.cells.join("×")} patches${view.prefix ? `, ${view.prefix} before them` : ""}` : null],
        ]))),
    h("div", { class: "card scroll" }, h("table", { id: "layers" },
      h("thead", {}, h("tr", {}, columns.map(([name, , kind]) => h("th", { class: kind ?? null, scope: "col" }, name)))),
      h("tbody", {}, data.layers.map((layer) => h("tr", { "aria-selected": String(layer === now) },
        columns.map(([, cell, kind]) => h("td", { class: kind ?? null }, cell(layer)))))))),
  ];
}

function strip() {
  return h("div", { class: "strip", role: "group", "aria-label": "Images" }, mapRows.map((row) => tipped(h("button", {
    type: "button", "data-id": `image-${row}`, "aria-pressed": String(row === rowNow()), "aria-label": keyOf(row), onclick: () => go({ row, channel: state.channel }) },
  data.photos[row] ? h("img", { src: `data:image/jpeg;base64,${data.photos[row].jpeg}`, alt: "", loading: "lazy" }) : keyOf(row).slice(-18)), keyOf(row))));
}

function drawMaps() {
  const layer = layerFor(mapLayers), row = rowNow();
  if (!layer || row === null) return [h("p", { class: "note" }, "This report holds no maps: there was no image, or no room.")];
  const entry = data.maps[row][indexOf(layer)];
  const { view } = layer;
  const head = h("div", { class: "bar noprint" }, layerSelect(mapLayers),
    h("label", {}, "Image", h("select", { "data-id": "image", onchange: (e) => go({ row: mapRows[e.target.selectedIndex] }) },
      mapRows.map((one) => h("option", { selected: one === row }, keyOf(one))))),
    view.kind === "vector" ? null : toggles("Scale", state.scale, { own: "each map", shared: "all alike" }, (scale) => go({ scale })));
  const title = h("div", {}, h("h2", {}, layer.name), h("p", { class: "note" }, [keyOf(row), ...layer.numbers, mapsTold(layer)].join(" · ")));
  if (!entry) return [title, head, strip(), h("p", { class: "note" }, "There was no room for these maps.")];
  return [title, head, strip(), view.kind === "vector" ? vectorSheet(layer, row, entry) : mapSheet(layer, row, entry)];
}
function mapsTold(layer) {
  const { view } = layer, many = view.shown ? view.shown.length : view.count;
  const noun = { maps: "channel", tokens: "feature", planes: "plane", vector: "value" }[view.kind];
  const what = view.shown ? `${many.toLocaleString("en")} of ${plural(view.count, noun)}${layer.channels ? ": those that vary most over the data set" : ""}` : plural(view.count, noun);
  const size = view.kind === "vector" ? "" : `, ${view.cells.join("×")} cells`;
  return `${what}${size}${view.pool > 1 ? `, averaged over ${view.pool}×${view.pool} to ${view.drawn.join("×")}` : ""}`;
}

function mapSheet(layer, row, entry) {
  const { view } = layer;
  const numbers = view.shown ?? Array.from({ length: view.count }, (_, i) => i);
  let chosen = state.channel === null ? -1 : numbers.indexOf(Number(state.channel));
  // Of a map without any finite value the ends are null, which is no number: not 0.
  const highest = Math.max(...entry.high.map((v) => v ?? -Infinity)), lowest = Math.min(...entry.low.map((v) => v ?? Infinity));
  const all = Number.isFinite(highest) ? [lowest, highest] : [null, null];
  if (chosen < 0) chosen = Math.max(0, entry.high.indexOf(highest));
  const rangeOf = (i) => (state.scale === "shared" ? all : [entry.low[i], entry.high[i]]);
  const placed = view.kind !== "planes" && data.geometry && inputOf(row);
  const canvases = [];
  const cards = h("div", { class: "maps", role: "group", "aria-label": `maps of ${layer.name}` }, numbers.map((n, i) => {
    const canvas = h("canvas", {});
    canvas.style.aspectRatio = `${view.drawn[1]} / ${view.drawn[0]}`;
    canvases.push(canvas);
    return tipped(h("button", { type: "button", "data-id": `map-${n}`, "data-channel": n, "aria-pressed": String(i === chosen),
      "aria-label": apartTold(entry, i, n), onclick: () => go({ channel: n }) },
    canvas, String(n), h("small", {}, entry.low[i] === null ? "not finite" : `${number(entry.low[i], 2)} … ${number(entry.high[i], 2)}`)), apartTold(entry, i, n));
  }));
  const over = h("canvas", { class: "over", "aria-hidden": "true" });
  const showOver = () => { over.style.opacity = state.opacity; };
  showOver();
  over.hidden = state.overlay !== "on";
  const frame = placed ? photo(row, over) : h("div", { class: "frame" }, over);
  if (placed) place(over, layer, inputOf(row));
  else {
    over.hidden = false;
    over.style.opacity = 1;
    Object.assign(over.style, { inset: "0", width: "100%", height: "100%" });
    frame.style.aspectRatio = `${view.drawn[1]} / ${view.drawn[0]}`;
  }
  withMaps(entry, view, (levels, columns, width) => {
    canvases.forEach((canvas, i) => paint(canvas, levels, columns, width, entry, view, i, rangeOf(i)));
    paint(over, levels, columns, width, entry, view, chosen, rangeOf(chosen));
    if (placed) probe(frame, layer, row, (y, x) => valueOf(levelAt(levels, columns, width, view, chosen, y, x), entry.low[chosen], entry.high[chosen]));
  });
  const range = rangeOf(chosen);
  const side = h("div", { class: "card side" },
    h("h3", {}, `${view.kind === "tokens" ? "feature" : view.kind === "planes" ? "plane" : "channel"} ${numbers[chosen]}`), frame,
    h("div", { class: "scale", id: "range", css: { margin: ".7rem 0" } }, h("span", {}, number(range[0])), colourBar(), h("span", {}, number(range[1]))),
    placed ? h("div", { class: "bar noprint" },
      h("button", { type: "button", "data-id": "overlay", "aria-pressed": String(state.overlay === "on"), onclick: () => go({ overlay: state.overlay === "on" ? "off" : "on" }) }, "Overlay"),
      h("label", { css: { flex: "1" } }, "Opacity", h("input", { type: "range", min: "0", max: "1", step: "0.05", value: state.opacity, "data-id": "opacity",
        oninput: (e) => { go({ opacity: e.target.value }, true); showOver(); } }))) : null,
    h("p", { class: "note", css: { marginTop: ".6rem" } }, apartTold(entry, chosen, numbers[chosen]),
      !placed ? " Where these maps lie in the photo is not known." : layer.field || view.kind === "tokens" ? "" : " The map is stretched over the input: its exact place is not recorded."),
    layer.channels && view.kind !== "planes" ? h("p", { class: "noprint" }, h("a", { href: hashOf({ view: "channels", channel: numbers[chosen] }) }, "Its strongest images")) : null);
  return h("div", { class: "sheet" }, side, h("div", {}, cards));
}
function apartTold(entry, i, n) {
  const range = entry.low[i] === null ? `${n}: no value is finite.` : `${n}: ${number(entry.low[i])} to ${number(entry.high[i])}.`;
  if (!entry.apart) return range;
  const values = entry.apart[i];
  return `${range} ${values.length === 1 ? "The cls token" : "The tokens before the patches"}: ${values.map((v) => number(v)).join(", ")}.`;
}
/** Lay a map over the input where its cells look. */
function place(over, layer, input) {
  const { field, view } = layer;
  const box = [0, 1].map((axis) => {
    if (view.kind === "tokens" || !field) return [0, 100 * (view.drawn[axis] * view.pool) / view.cells[axis]];
    const from = field.offset[axis] - field.stride[axis] / 2;
    return [(100 * from) / input[axis], (100 * view.drawn[axis] * view.pool * field.stride[axis]) / input[axis]];
  });
  Object.assign(over.style, { top: `${box[0][0]}%`, height: `${box[0][1]}%`, left: `${box[1][0]}%`, width: `${box[1][1]}%` });
}
/** Under the pointer: the value of the cell there, and what it sees. */
function probe(frame, layer, row, read) {
  const input = inputOf(row), { view, field } = layer;
  let drawn = null;
  const clear = () => { drawn?.remove(); hideTip(); };
  frame.addEventListener("pointermove", (e) => {
    clear();
    const at = frame.getBoundingClientRect();
    const cell = [(e.clientY - at.top) / at.height, (e.clientX - at.left) / at.width].map((part, axis) => {
      if (view.kind === "tokens" || !field) return Math.floor(part * view.cells[axis]);
      return Math.round((part * input[axis] - field.offset[axis]) / field.stride[axis]);
    });
    if (cell.some((v, axis) => v < 0 || v >= view.cells[axis])) return;
    const value = read(...cell.map((v) => Math.floor(v / view.pool)));
    drawn = marks(seen(layer, cell, input), input);
    frame.append(drawn);
    showTip(`y ${cell[0]}, x ${cell[1]}: ${value === null ? "not finite" : number(value)}`, e.clientX, e.clientY);
  });
  frame.addEventListener("pointerleave", clear);
}

function vectorSheet(layer, row, entry) {
  const { values } = entry, numbers = layer.view.shown ?? values.map((_, i) => i);
  const finite = values.filter((v) => v !== null);
  if (!finite.length) return h("p", { class: "note" }, "No finite values.");
  const low = Math.min(0, ...finite), high = Math.max(0, ...finite), wide = 800, tall = 240, span = high - low || 1;
  const y = (v) => 8 + ((tall - 16) * (high - v)) / span;
  const svg = s("svg", { class: "chart", viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": `values of ${layer.name}` });
  for (const v of ticks(low, high)) svg.append(s("line", { class: "axis", x1: 46, x2: wide, y1: y(v), y2: y(v) }), s("text", { x: 40, y: y(v) + 4, "text-anchor": "end" }, number(v)));
  const each = (wide - 46) / values.length;
  values.forEach((v, i) => {
    if (v === null) return;
    const now = Number(state.channel) === numbers[i] && state.channel !== null;
    svg.append(tipped(s("g", { class: `pick${now ? " now" : ""}`, onclick: () => go({ channel: numbers[i] }) },
      s("rect", { class: "hit", x: 46 + each * i, width: each, y: 0, height: tall }),
      s("rect", { class: "mark", x: 46 + each * i, width: Math.max(now ? 3 : 0.8, each * 0.8), y: Math.min(y(0), y(v)), height: Math.max(0.5, Math.abs(y(v) - y(0))) })),
    `${numbers[i]}: ${number(v, 4)}`));
  });
  const order = values.map((v, i) => [v ?? -Infinity, i]).sort((a, b) => b[0] - a[0]).slice(0, 12);
  return h("div", { class: "sheet" }, h("div", { class: "card" }, photo(row)),
    h("div", { class: "card" }, h("div", { class: "scroll plot" }, svg), h("h3", { css: { marginTop: "1rem" } }, "Strongest"), h("table", { id: "strongest" }, h("tbody", {}, order.map(([v, i]) =>
      h("tr", {}, h("td", { class: "n" }, layer.channels ? h("a", { href: hashOf({ view: "channels", channel: numbers[i] }) }, String(numbers[i])) : String(numbers[i])),
        h("td", { class: "n" }, number(v, 4)), h("td", { css: { width: "70%" } }, valueBar(v, high))))))));
}
function valueBar(v, high) {
  return s("svg", { viewBox: "0 0 100 6", width: "100%", height: "8", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("rect", { class: "bars", x: 0, y: 0, height: 6, width: Math.max(0, (100 * v) / (high || 1)) }));
}

const unpacked = new Map();
/** The numbers of a layer's channels as typed arrays. */
function channelsOf(layer) {
  if (!unpacked.has(layer)) {
    const raw = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
    const c = layer.channels, made = { ...c };
    for (const name of ["mean", "std", "max", "zeros", "top_value"]) if (c[name] !== undefined) made[name] = new Float32Array(raw(c[name]));
    for (const name of ["top_row", "top_y", "top_x"]) if (c[name] !== undefined) made[name] = new Int32Array(raw(c[name]));
    made.numbers = c.shown ?? Array.from({ length: c.count }, (_, i) => i);
    unpacked.set(layer, made);
  }
  return unpacked.get(layer);
}
function channelNow(channels) {
  const at = state.channel === null ? -1 : channels.numbers.indexOf(Number(state.channel));
  return at >= 0 ? at : channels.std.reduce((best, v, i) => (v > channels.std[best] ? i : best), 0);
}

function drawChannels() {
  const layer = layerFor(channelLayers);
  if (!layer) return [h("p", { class: "note" }, "This report holds no statistics by channel: the file has none, or there was no room.")];
  const channels = channelsOf(layer), at = channelNow(channels), n = channels.numbers[at];
  const missing = state.channel !== null && Number(state.channel) !== n;
  const stats = [["mean ± std", `${number(channels.mean[at])} ± ${number(channels.std[at])}`], ["max", number(channels.max[at])], ["zeros", share(channels.zeros[at])],
    channels.zeros[at] === 1 ? ["", "dead: zero everywhere"] : null];
  const canvas = h("canvas", { id: "picker", width: channels.numbers.length, height: 1, role: "img", "aria-label": "standard deviation of every channel; the number field chooses one",
    onclick: (e) => { const box = canvas.getBoundingClientRect(); go({ channel: channels.numbers[Math.min(channels.numbers.length - 1, Math.floor(((e.clientX - box.left) / box.width) * channels.numbers.length))] }); },
    onpointermove: (e) => { const box = canvas.getBoundingClientRect(), i = Math.max(0, Math.min(channels.numbers.length - 1, Math.floor(((e.clientX - box.left) / box.width) * channels.numbers.length)));
      showTip(`${channels.numbers[i]}: std ${number(channels.std[i])}, zeros ${share(channels.zeros[i])}`, e.clientX, e.clientY); },
    onpointerleave: hideTip });
  const most = Math.max(...channels.std.filter(Number.isFinite), 1e-30), context = canvas.getContext("2d"), line = context.createImageData(channels.numbers.length, 1);
  channels.std.forEach((v, i) => { const c = 3 * Math.round((255 * (Number.isFinite(v) ? v : 0)) / most); line.data.set([LUT[c], LUT[c + 1], LUT[c + 2], 255], 4 * i); });
  context.putImageData(line, 0, 0);
  const step = (by) => () => go({ channel: channels.numbers[(at + by + channels.numbers.length) % channels.numbers.length] });
  return [
    h("div", {}, h("h2", {}, `${layer.name}, channel ${n}`), h("p", { class: "note" }, [...layer.numbers, ...stats.filter(Boolean).map(([k, v]) => `${k ? `${k} ` : ""}${v}`)].join(" · "), " over all images")),
    missing ? h("p", { class: "note bad", role: "alert" }, `Channel ${state.channel} is not in this report: this is the one that varies most.`) : null,
    h("div", { class: "bar noprint" }, layerSelect(channelLayers),
      h("label", {}, `Channel, of ${channels.count.toLocaleString("en")}`, h("input", { type: "number", id: "channel", "data-id": "channel", min: "0", max: String(channels.count - 1), value: String(n),
        onchange: (e) => go({ channel: e.target.value }) })),
      h("div", { class: "group" }, h("button", { type: "button", "data-id": "before", onclick: step(-1), "aria-label": "channel before" }, "←"), h("button", { type: "button", "data-id": "after", onclick: step(1), "aria-label": "next channel" }, "→"))),
    h("div", { class: "noprint" }, h("div", { class: "picker" }, canvas, h("span", { "aria-hidden": "true", css: { left: `${(100 * (at + 0.5)) / channels.numbers.length}%` } })), h("p", { class: "note" }, channels.shown ? `${channels.numbers.length.toLocaleString("en")} channels that vary most, by their standard deviation; click to choose.` : "Every channel by its standard deviation; click to choose.")),
    channels.k ? h("div", { class: "tops", id: "tops" }, Array.from({ length: channels.k }, (_, i) => topCard(layer, channels, at * channels.k + i, n)))
      : h("p", { class: "note" }, "The run kept no strongest images (extract with --top-k)."),
    channels.k ? h("p", { class: "note" }, legend(layer)) : null,
  ];
}
function legend(layer) {
  if (layer.view.kind === "vector") return "";
  if (layer.view.kind === "tokens") return "The box is the patch of the token; attention lets it see the whole image.";
  if (!layer.field) return "The ring is the cell's place on the map, over the input: its receptive field is not recorded.";
  return layer.erf ? "The box is the effective field of the strongest cell, clipped to the image; dashed is all that it can see." : "The box is all that the strongest cell can see, clipped to the image; a ring marks its centre where that is nearly everything.";
}
function topCard(layer, channels, i, n) {
  const row = channels.top_row[i];
  if (row < 0) return null;
  const input = inputOf(row), y = channels.top_y[i], x = channels.top_x[i], { view } = layer;
  let cell = null, note = "";
  if (view.kind === "tokens" && y >= 0) {
    const patch = y - view.prefix;
    if (patch >= 0) cell = [Math.floor(patch / view.cells[1]), patch % view.cells[1]];
    note = patch >= 0 ? `patch ${cell.join(", ")}` : y === 0 ? "the cls token" : `token ${y}`;
  } else if (view.kind === "maps" && y >= 0 && x >= 0) {
    cell = [y, x];
    note = `cell ${y}, ${x}`;
  } else if (y >= 0) note = `at ${y}${x >= 0 ? `, ${x}` : ""}`;
  const where = cell && input && data.geometry ? seen(layer, cell, input) : null;
  const frame = photo(row, where ? marks(where, input) : null);
  const box = where && (where.use ?? where.field);
  let crop = null;
  if (box && data.photos[row] && covers(box, input) < 0.5 && covers(box, input) > 0) {
    crop = h("canvas", { class: "crop", "aria-hidden": "true" });
    withPicture(`data:image/jpeg;base64,${data.photos[row].jpeg}`, (image) => {
      const [fy, fx] = [image.height / input[0], image.width / input[1]];
      const size = [(box[3] - box[1]) * fx, (box[2] - box[0]) * fy];
      crop.width = 96;
      crop.height = Math.max(1, Math.round((96 * size[1]) / size[0]));
      crop.getContext("2d").drawImage(image, box[1] * fx, box[0] * fy, size[0], size[1], 0, 0, crop.width, crop.height);
    });
  }
  const linked = data.maps[row]?.[indexOf(layer)];
  return h("figure", { "data-row": row, "data-box": box ? box.map((v) => Number(v.toFixed(3))).join(" ") : null }, frame,
    h("figcaption", {}, crop, h("strong", {}, number(channels.top_value[i], 4)), h("span", { class: "mono" }, keyOf(row)), h("span", { class: "faint" }, note),
      linked ? h("a", { class: "noprint", href: hashOf({ view: "maps", row, channel: n }) }, "Its maps") : null));
}

// ------------------------------------------------------------------------------------------------------- everything

const DRAW = { run: drawRun, layers: drawLayers, maps: drawMaps, channels: drawChannels };

/** All views are drawn, those not chosen are hidden: so paper gets all of them. */
function draw() {
  readHash();
  hideTip();
  const focused = document.activeElement?.dataset?.id, scrolled = document.querySelector(".strip")?.scrollLeft ?? 0;
  began();
  for (const [name, view] of Object.entries(DRAW)) {
    const section = document.getElementById(`view-${name}`);
    section.hidden = name !== state.view;
    section.replaceChildren(...view().flat().filter(Boolean));
  }
  document.querySelector("nav").replaceChildren(...Object.entries(VIEWS).map(([name, text]) =>
    h("a", { href: hashOf({ view: name }), "data-id": `nav-${name}`, "aria-current": name === state.view ? "page" : null }, text)));
  if (focused) document.querySelector(`section:not([hidden]) [data-id="${CSS.escape(focused)}"], nav [data-id="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  const line = document.querySelector(".strip");
  if (line) line.scrollLeft = scrolled;
  ended();
}

function cycle(list, now, by) {
  if (!list.length) return null;
  return list[(list.indexOf(now) + by + list.length) % list.length];
}
const MOVES = {
  image: (by) => go({ row: cycle(mapRows, rowNow(), by) }),
  layer: (by) => {
    const list = { maps: mapLayers, channels: channelLayers }[state.view] ?? data.layers;
    if (list.length) go({ layer: cycle(list, layerFor(list), by).name, channel: null });
  },
  channel: (by) => {
    const maps = state.view === "maps", layer = layerFor(maps ? mapLayers : channelLayers);
    if (!layer) return;
    const numbers = maps ? layer.view.shown ?? Array.from({ length: layer.view.count }, (_, i) => i) : channelsOf(layer).numbers;
    const pressed = document.querySelector('.maps [aria-pressed="true"]');
    const now = maps ? Number(state.channel ?? pressed?.dataset.channel ?? numbers[0]) : channelsOf(layer).numbers[channelNow(channelsOf(layer))];
    go({ channel: cycle(numbers, now, by) });
  },
};
const KEYS = {
  1: ["the run", () => go({ view: "run" })], 2: ["layers", () => go({ view: "layers" })],
  3: ["maps", () => go({ view: "maps" })], 4: ["channels", () => go({ view: "channels" })],
  ArrowLeft: ["image before (maps), channel before (channels)", () => MOVES[state.view === "channels" ? "channel" : "image"](-1), "←"],
  ArrowRight: ["next image, next channel", () => MOVES[state.view === "channels" ? "channel" : "image"](1), "→"],
  j: ["next layer", () => MOVES.layer(1)], k: ["layer before", () => MOVES.layer(-1)],
  n: ["next channel", () => MOVES.channel(1)], p: ["channel before", () => MOVES.channel(-1)],
  o: ["overlay on or off", () => go({ overlay: state.overlay === "on" ? "off" : "on" })],
  s: ["scale: each map, all alike", () => go({ scale: state.scale === "own" ? "shared" : "own" })],
  t: ["dark or light", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true)],
  "?": ["these keys", () => document.getElementById("keys").showModal()],
};

function setTheme(theme, keep) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  if (keep) try { localStorage.setItem("fmextract-theme", theme); } catch { /* a page from a file may have no storage */ }
}

function begin() {
  let kept = null;
  try { kept = localStorage.getItem("fmextract-theme"); } catch { /* as above */ }
  const system = matchMedia("(prefers-color-scheme: dark)");
  setTheme(kept ?? (system.matches ? "dark" : "light"), false);
  system.addEventListener("change", () => { if (!kept) setTheme(system.matches ? "dark" : "light", false); });
  document.getElementById("theme").addEventListener("click", KEYS.t[1]);
  document.getElementById("help").addEventListener("click", KEYS["?"][1]);
  document.getElementById("title").textContent = data.run.model || data.run.name;
  document.getElementById("subtitle").textContent = `${data.run.name} · ${plural(data.run.rows, "image")} · ${plural(data.layers.length, "layer")}`;
  const dialog = document.getElementById("keys");
  dialog.append(h("h2", { id: "keys-title" }, "Keys"), h("table", {}, h("tbody", {}, Object.entries(KEYS).map(([key, [what, , sign]]) =>
    h("tr", {}, h("td", {}, h("kbd", {}, sign ?? key)), h("td", {}, what))))), h("form", { method: "dialog" }, h("button", { type: "button", onclick: () => dialog.close() }, "Close")));
  addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || dialog.open || e.target.closest("input, select, textarea")) return;
    const key = KEYS[e.key];
    if (!key) return;
    e.preventDefault();
    key[1]();
  });
  addEventListener("hashchange", draw);
  draw();
}
begin();
