"use strict";
// The page: pictures with a map over each, what hands do to them, and what is written beside them.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const NEAR = 2; // patches: what is less far from a pinned one is not listed among the nearest
const STOPS = [[11, 7, 36], [87, 16, 110], [182, 54, 121], [241, 118, 80], [252, 253, 191]]; // dark to bright, evenly

const state = {
  block: data.blocks.length - 1,
  pins: [], // {picture, patch, sign}
  pointer: null, // {picture, patch}
  maps: [], // a value a patch for each picture, or null where the view has none
  pca: null,
};
const layers = data.pictures.map(() => new Map()); // by block, decoded when first shown
const views = data.pictures.map(makeView);

function layer(p) {
  if (!layers[p].has(state.block)) layers[p].set(state.block, readLayer(data.pictures[p].layers[state.block]));
  return layers[p].get(state.block);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function makeView(picture, p) {
  const { columns, rows } = picture;
  const heat = element("canvas", { className: "heat", width: columns, height: rows });
  const marks = element("canvas", { className: "marks", width: columns * 16, height: rows * 16 });
  const stack = element("div", { className: "stack", tabIndex: 0 },
    element("img", { src: picture.photo, alt: "", draggable: false }), heat, marks);
  stack.setAttribute("role", "application");
  stack.setAttribute("aria-label", `${picture.name}, ${rows} rows and ${columns} columns of patches`);
  stack.setAttribute("aria-describedby", "help");
  const button = (text, what) => element("button", { type: "button", textContent: text, onclick: () => download(p, what) });
  const caption = element("figcaption", {}, element("strong", { textContent: picture.name }),
    element("span", { textContent: `${picture.width} x ${picture.height} px, ${rows} x ${columns} patches` }),
    element("span", { className: "saves" }, button("download mask", "mask"), button("download heat map", "heat")));
  const figure = element("figure", {}, stack, caption);
  figure.style.setProperty("--aspect", picture.width / picture.height);
  $("pictures").append(figure);

  const patchAt = (event) => {
    const box = stack.getBoundingClientRect();
    const cell = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor((at / size) * count)));
    return cell(event.clientY - box.top, box.height, rows) * columns + cell(event.clientX - box.left, box.width, columns);
  };
  stack.addEventListener("pointermove", (event) => point(p, patchAt(event)));
  stack.addEventListener("pointerleave", () => point(null));
  stack.addEventListener("click", (event) => {
    pin(p, patchAt(event), event);
    stack.focus({ preventScroll: true });
  });
  const middle = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  stack.addEventListener("focus", () => stack.matches(":focus-visible") && state.pointer?.picture !== p && point(p, middle));
  stack.addEventListener("keydown", (event) => {
    const here = state.pointer?.picture === p ? state.pointer.patch : middle;
    const y = Math.floor(here / columns), x = here % columns;
    const moved = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (moved) {
      const clamp = (v, count) => Math.min(count - 1, Math.max(0, v));
      point(p, clamp(y + moved[0], rows) * columns + clamp(x + moved[1], columns));
    } else if (event.key === "Enter" || event.key === " ") pin(p, here, event);
    else return;
    event.preventDefault();
  });
  return { stack, heat, marks };
}

function point(picture, patch) {
  const before = state.pointer;
  if (before?.picture === picture && before?.patch === patch) return;
  state.pointer = picture === null ? null : { picture, patch };
  if (chosen("view") === "similarity" && !state.pins.length && state.pointer) refresh();
  else decorate();
}

function pin(picture, patch, event) {
  const how = event.shiftKey ? "add" : event.altKey ? "subtract" : chosen("click");
  const one = { picture, patch, sign: how === "subtract" ? -1 : 1 };
  state.pins = how === "pin" ? [one] : [...state.pins, one];
  state.pointer = { picture, patch };
  document.querySelector('input[name="view"][value="similarity"]').checked = true;
  refresh();
}

// The query of the similarity view, a unit vector: of what is pinned, else of the patch under the pointer.
function currentQuery() {
  const terms = state.pins.length ? state.pins : state.pointer ? [{ ...state.pointer, sign: 1 }] : [];
  return terms.length ? query(terms.map((t) => ({ ...t, layer: layer(t.picture) }))) : null;
}

function compute() {
  const view = chosen("view");
  if (view === "attention") return data.pictures.map((_, p) => attention(layer(p), Number($("head").value)));
  if (view === "cls") return data.pictures.map((_, p) => cosines(layer(p), layer(p).cls));
  if (view === "pca") return state.maps; // colours lie over the picture, and the mask stays that of the view before
  const towards = currentQuery();
  return data.pictures.map((_, p) => (towards ? cosines(layer(p), towards) : null));
}

function maskOf(p) {
  const map = state.maps[p];
  const threshold = Number($("threshold").value);
  return map && Uint8Array.from(map, (v) => (v > threshold ? 1 : 0));
}

function refresh() {
  state.maps = compute();
  if (chosen("view") === "pca") {
    const patches = data.pictures.map((_, p) => {
      const mask = chosen("over") === "mask" ? maskOf(p) : null;
      return Array.from({ length: layer(p).count }, (_, i) => i).filter((i) => !mask || mask[i]);
    });
    state.pca = components(data.pictures.map((_, p) => layer(p)), patches);
  }
  draw();
  decorate();
}

// The two values that stand for dark and bright.
function range() {
  const view = chosen("view");
  const shown = state.maps.filter(Boolean);
  if (!shown.length || (view !== "attention" && !$("stretch").checked)) return [0, 1];
  const all = shown.flatMap((map) => [map.reduce((a, b) => Math.min(a, b)), map.reduce((a, b) => Math.max(a, b))]);
  return [view === "attention" && !$("stretch").checked ? 0 : Math.min(...all), Math.max(...all)];
}

function ramp(t) {
  const at = Math.min(1, Math.max(0, t)) * (STOPS.length - 1);
  const i = Math.min(STOPS.length - 2, Math.floor(at));
  return STOPS[i].map((low, c) => low + (at - i) * (STOPS[i + 1][c] - low));
}

// The map of picture p, a pixel a patch.
function imageOf(p) {
  const { columns, rows } = data.pictures[p];
  const image = new ImageData(columns, rows);
  const [low, high] = range();
  const masked = $("masked").checked || (chosen("view") === "pca" && chosen("over") === "mask");
  const mask = masked ? maskOf(p) : null;
  for (let i = 0; i < rows * columns; i++) {
    let colour;
    if (mask && !mask[i]) colour = [0, 0, 0];
    else if (chosen("view") === "pca") colour = state.pca ? pcaColour(layer(p), i, state.pca).map((v) => 255 * v) : null;
    else if (state.maps[p]) colour = ramp((state.maps[p][i] - low) / (high - low || 1));
    if (colour) image.data.set([...colour.map(Math.round), 255], 4 * i);
  }
  return image;
}

function draw() {
  views.forEach(({ heat }, p) => {
    heat.getContext("2d").putImageData(imageOf(p), 0, 0);
    heat.style.opacity = $("opacity").value;
  });
  const [low, high] = range();
  $("low").textContent = low.toFixed(chosen("view") === "attention" ? 4 : 2);
  $("high").textContent = high.toFixed(chosen("view") === "attention" ? 4 : 2);
  $("ramp").hidden = $("low").hidden = $("high").hidden = chosen("view") === "pca";
  $("head-field").hidden = chosen("view") !== "attention";
  $("over-field").hidden = chosen("view") !== "pca";
  $("nearest-field").hidden = chosen("view") !== "similarity";
}

// Frames, the line under the controls, and the list of the nearest.
function decorate() {
  const best = state.pins.length || state.pointer ? nearest() : [];
  views.forEach(({ marks }, p) => {
    const pen = marks.getContext("2d");
    pen.clearRect(0, 0, marks.width, marks.height);
    const frame = (patch, colour) => {
      const columns = data.pictures[p].columns;
      const [x, y] = [16 * (patch % columns), 16 * Math.floor(patch / columns)];
      pen.lineJoin = "round";
      for (const [width, style] of [[7, "#000"], [3, colour]]) { // on a dark line, to be seen on any map
        pen.lineWidth = width;
        pen.strokeStyle = style;
        pen.strokeRect(x + 1.5, y + 1.5, 13, 13);
      }
    };
    const first = best.find((b) => b.picture === p);
    if (first && p !== (state.pins[0] ?? state.pointer).picture) frame(first.patch, "#ffd400");
    if (state.pointer?.picture === p) frame(state.pointer.patch, "#ffffff");
    for (const one of state.pins) if (one.picture === p) frame(one.patch, one.sign > 0 ? "#35d07f" : "#ff4d4d");
  });
  const at = state.pointer;
  if (!at) $("readout").textContent = "point at a patch";
  else {
    const columns = data.pictures[at.picture].columns;
    const value = state.maps[at.picture]?.[at.patch];
    const place = `row ${Math.floor(at.patch / columns)}, column ${at.patch % columns}`;
    const what = chosen("view") === "attention" ? "attention" : "cosine";
    $("readout").textContent = value === undefined ? place : `${place}: ${what} ${value.toFixed(4)}`;
  }
  $("nearest").replaceChildren(...best.slice(0, 10).map(({ picture, patch, value }) => {
    const { name, columns } = data.pictures[picture];
    const place = `${Math.floor(patch / columns)}, ${patch % columns}: ${value.toFixed(3)}`;
    const go = () => { views[picture].stack.focus(); point(picture, patch); };
    const text = data.pictures.length > 1 ? `${name} ${place}` : place;
    return element("li", {}, element("button", { type: "button", textContent: text, onclick: go }));
  }));
}

// Patches by falling similarity to the query, without those beside a pinned one (or the pointer's).
function nearest() {
  if (chosen("view") !== "similarity") return [];
  const seeds = state.pins.length ? state.pins : [state.pointer];
  const near = (picture, patch) => seeds.some((s) => {
    const columns = data.pictures[picture].columns;
    const far = [Math.floor(s.patch / columns) - Math.floor(patch / columns), (s.patch % columns) - (patch % columns)];
    return s.picture === picture && Math.max(...far.map(Math.abs)) < NEAR;
  });
  const all = [];
  state.maps.forEach((map, picture) => map?.forEach((value, patch) => {
    if (!near(picture, patch)) all.push({ picture, patch, value });
  }));
  return all.sort((a, b) => b.value - a.value);
}

// A PNG of the photo's own size, of the mask (0 and 255) or of the heat map as it is drawn.
function download(p, what) {
  const { name, width, height, columns, rows } = data.pictures[p];
  const small = element("canvas", { width: columns, height: rows });
  let image = imageOf(p);
  if (what === "mask") {
    const mask = maskOf(p);
    if (!mask) return void ($("readout").textContent = "pin a patch first: the mask is what is more similar to it than the threshold");
    image = new ImageData(columns, rows);
    mask.forEach((inside, i) => image.data.set([255 * inside, 255 * inside, 255 * inside, 255], 4 * i));
  }
  small.getContext("2d").putImageData(image, 0, 0);
  const large = element("canvas", { width, height });
  const pen = large.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, width, height);
  large.toBlob((blob) => {
    const url = URL.createObjectURL(blob);
    element("a", { href: url, download: `${name.replace(/\.[^.]*$/, "")}-${what}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
}

function clear() {
  state.pins = [];
  refresh();
}

function setUp() {
  $("controls").addEventListener("input", () => {
    $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
    state.block = Number($("block").value);
    $("block-value").textContent = data.blocks[state.block];
    refresh();
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("clear").addEventListener("click", clear);
  document.addEventListener("keydown", (event) => event.key === "Escape" && clear());
  $("block").max = data.blocks.length - 1;
  $("block").value = state.block;
  $("block-value").textContent = data.blocks[state.block];
  $("block-field").hidden = data.blocks.length === 1;
  document.querySelector("input[value=attention]").parentElement.hidden = !data.heads;
  $("head").append(new Option("mean of all", -1), ...Array.from({ length: data.heads }, (_, h) => new Option(h, h)));
  const pen = $("ramp").getContext("2d");
  for (let x = 0; x < 256; x++) {
    pen.fillStyle = `rgb(${ramp(x / 255).map(Math.round)})`;
    pen.fillRect(x, 0, 1, 1);
  }
  const unit = data.heads ? "block" : "stage", normed = data.heads ? "after the final norm" : "the last after the final norm";
  const blocks = data.blocks.length === 1 ? `${unit} ${data.blocks}` : `${unit}s ${data.blocks.join(", ")}`;
  $("footer").textContent =
    `${data.model}, weights ${data.weights}. Output of ${blocks} (counted from 0), ${normed}, patches of ` +
    `${data.patch} px, ${[...new Set(data.dims)].join(", ")} channels kept as int8: a cosine similarity is off by at most ` +
    `${data.cosineError.toExponential(1)}, measured when this page was written. ` +
    data.pictures.map((p) => `${p.name}: run at ${p.rows * data.patch} x ${p.columns * data.patch} px`).join("; ") + ".";
  refresh();
}

setUp();
