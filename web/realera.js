// RealEra in the page: the neighbourhood, the scope list, the live loss, before and after.
// Each view is a widget under its node and shows what the node sent when it ran.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { inChinese } from "./messages.js";

// The colours of a view, each made readable on what the view stands on.
const HUES = { concept: "#d1495b", near: "#edae49", far: "#6c8ebf", grey: "#8a8a8a" };
const CONTRAST = 4.6; // WCAG asks 4.5 of small text; the rest is for the rounding of a mixture

const TEXTS = {
  en: {
    run: "Run the graph to see this.",
    unsaved: "Run the graph to save.",
    suggest: "Suggest anchors",
    suggesting: "Runs this node alone and lists anchors for its concepts",
    hint: "Click a word that is to keep its meaning, and run again.",
    connect: "Connect a Beyond Sampler to keep the meaning of a prompt.",
    near: "are erased too",
    far: "keep their meaning",
    left: "left image",
    right: "right image",
    way: (share, anchor) => `${share} of the way to ${anchor}`,
    moved: "moved",
    drawn: "when drawn",
    running: "Running…",
    concept: "concept (Eq. 8)",
    neighbors: "neighbours and beyond points (Eq. 9)",
    step: (step, steps) => `step ${step} of ${steps}`,
    stopped: "stopped",
    emptied: (files, size, folder) => `removed ${files} files, ${size} MB, from ${folder}`,
    automatic: "automatic range",
    unfold: "show advanced inputs",
    refold: "hide advanced inputs",
  },
  zh: {
    run: "运行工作流后显示。",
    unsaved: "运行工作流后保存。",
    suggest: "推荐锚点",
    suggesting: "单独运行此节点，为其概念列出锚点",
    hint: "点击应保持原意的词语，然后重新运行。",
    connect: "连接“外围采样器”后才能保留提示词。",
    near: "一并擦除",
    far: "保持原意",
    left: "左图",
    right: "右图",
    way: (share, anchor) => `向“${anchor}”移动 ${share}`,
    moved: "已偏移",
    drawn: "（画出后）",
    running: "运行中…",
    concept: "概念（式 8）",
    neighbors: "邻近词与外围点（式 9）",
    step: (step, steps) => `第 ${step} 步，共 ${steps} 步`,
    stopped: "已停止",
    emptied: (files, size, folder) => `已从 ${folder} 删除 ${files} 个文件，共 ${size} MB`,
    automatic: "自动范围",
    unfold: "显示高级输入",
    refold: "隐藏高级输入",
  },
};

/** What stands in an empty widget, which ComfyUI's own translations leave out. */
const PLACEHOLDERS = {
  zh: {
    leave_out: "要排除的词，例如：rocket, bird",
    words: "还要搜索的词语或提示词，每行一个",
    preserve: "要保留的提示词，每行一条",
    resume: "已保存的训练状态名称",
  },
};

/** Values of a combo as a user reads them; graphs keep the English ones. */
const OPTIONS = {
  zh: {
    source: {
      vocabulary: "词表 (vocabulary)",
      predictions: "模型预测 (predictions)",
      bank: "保留库 (bank)",
      isotropic: "随机方向 (isotropic)",
    },
    precision: { auto: "自动 (auto)" },
  },
};

function locale() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
}

function text(key) {
  return (TEXTS[locale()] ?? TEXTS.en)[key];
}

/** What a node says, line by line, in the language of the page. */
function translated(message) {
  return locale() === "zh" ? message.split("\n").map(inChinese).join("\n") : message;
}

function element(tag, style = {}, content = "") {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  made.textContent = content;
  return made;
}

// ------------------------------------------------------------------------ colours

/** The red, green and blue of a colour that the browser has computed, in [0, 1]. */
function channels(color) {
  return color.match(/[\d.]+/g).slice(0, 3).map((part) => part / (color.includes("srgb") ? 1 : 255));
}

function luminance(color) {
  const linear = color.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

/** A colour, mixed with black or white until its contrast with the ground reaches `CONTRAST`. */
function readable(color, ground) {
  const below = luminance(ground) + 0.05;
  const end = below > 0.229 ? 0 : 1; // there, black and white contrast alike
  const mix = (step) => color.map((c) => c + (step / 20) * (end - c));
  let step = 0;
  for (; step < 20; step++) {
    const own = luminance(mix(step)) + 0.05;
    if (Math.max(own / below, below / own) >= CONTRAST) break;
  }
  return `rgb(${mix(step).map((c) => Math.round(255 * c)).join(", ")})`;
}

const HEX = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);

/** Sets the colours of a view as its variables `--realera-…`, and returns them by name. */
function colorsOf(view) {
  const { backgroundColor, color } = getComputedStyle(view);
  const ground = channels(backgroundColor);
  const made = { text: readable(channels(color), ground) };
  for (const [name, hex] of Object.entries(HUES)) made[name] = readable(HEX(hex), ground);
  for (const [name, value] of Object.entries(made)) {
    view.style.setProperty(`--realera-${name}`, value);
  }
  return made;
}

const views = new Set(); // weak references to [view, what draws it], for when the theme changes

new MutationObserver(() => {
  for (const reference of views) {
    const shown = reference.deref();
    if (shown) shown.repaint();
    else views.delete(reference);
  }
}).observe(document.documentElement, { attributeFilter: ["style", "class"] });

// ------------------------------------------------------------------------ views

const MARGINS = 20; // pixels that a classic node keeps free above and below a widget's element

/** Lets the wheel and a drag with the middle button over a classic node's view reach the graph, as
 * ComfyUI's text boxes do; Nodes 2.0 does so for every element. A list that can scroll keeps the
 * wheel. */
function forwardToGraph(view) {
  const classic = () => !view.closest("[data-node-id]");
  view.addEventListener("wheel", (event) => {
    if (!classic()) return;
    const list = event.target.closest(".realera-scope");
    if (list && list.scrollHeight > list.clientHeight && !event.ctrlKey) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const middle = { pointerdown: "processMouseDown", pointerup: "processMouseUp" };
  for (const [name, method] of Object.entries(middle)) {
    view.addEventListener(name, (event) => {
      if (classic() && event.button === 1) app.canvas[method](event);
    });
  }
  view.addEventListener("pointermove", (event) => {
    if (classic() && event.buttons & 4) app.canvas.processMouseMove(event);
  });
}

/** Adds a view under a node; it is neither saved nor sent.
 *
 * `height` is its smallest; it grows with its node. Classic nodes ask the widget for it, Nodes 2.0
 * the style. What is in it lies in a size container, so that it never pushes its node. The panel
 * at the right leaves it out: it would take the element away from its node.
 */
function addView(node, name, height, repaint) {
  const view = element("div", {
    boxSizing: "border-box",
    position: "relative",
    height: "100%",
    minHeight: `${height}px`,
    overflow: "hidden",
    containerType: "size",
    borderRadius: "6px",
    background: "var(--comfy-input-bg, #222)",
    color: "var(--input-text, #ddd)",
    font: "11px sans-serif",
  });
  view.className = "realera-view";
  const getMinHeight = () => height + MARGINS;
  const options = { serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight };
  const widget = node.addDOMWidget(name, name, view, options);
  widget.serialize = false;
  view.repaint = () => view.isConnected && repaint();
  views.add(new WeakRef(view));
  new ResizeObserver(view.repaint).observe(view);
  forwardToGraph(view);
  return view;
}

// ------------------------------------------------------------------------ errors

/** Shows on a node, in its view or in one made for it, what ComfyUI found wrong; "" removes it. */
function showError(node, message) {
  if (!node?.comfyClass?.startsWith("RealEra")) return;
  node.realeraError?.remove();
  node.realeraError = null;
  if (!message) return;
  let view = node.widgets?.find(({ element }) => element?.matches(".realera-view"))?.element;
  let discard = () => {};
  if (!view) {
    const size = [...node.size];
    view = addView(node, "realera_error", 70, () => colorsOf(view));
    discard = () => {
      node.removeWidget(node.widgets.find(({ name }) => name === "realera_error"));
      node.setSize(size);
    };
  }
  const box = element("div", {
    position: "absolute",
    inset: "auto 0 0 0",
    maxHeight: "100%",
    overflowY: "auto",
    boxSizing: "border-box",
    padding: "6px",
    background: "var(--comfy-input-bg, #222)",
    borderTop: "2px solid var(--realera-concept)",
    color: "var(--realera-concept)",
    font: "12px sans-serif",
    userSelect: "text",
    whiteSpace: "pre-line",
  });
  box.className = "realera-error";
  box.role = "alert";
  box.textContent = translated(message);
  view.append(box);
  view.repaint();
  node.realeraError = {
    remove() {
      box.remove();
      discard();
    },
  };
}

const failed = new Set(); // nodes that show an error of the last run
let refused = null; // what ComfyUI last refused, by node id

function clearErrors() {
  for (const node of failed) showError(node, "");
  failed.clear();
}

function fail(id, message) {
  const node = nodeOf(id);
  if (!node) return;
  failed.add(node);
  showError(node, message);
}

/** The messages of the inputs that ComfyUI refused on one node, each once. */
function messagesOf({ errors }) {
  const found = errors.map(({ type, message, details, extra_info: { input_name } = {} }) =>
    type === "custom_validation_failed"
      ? details.replace(`${input_name} - `, "")
      : [message, details].filter(Boolean).join(": "),
  );
  return [...new Set(found)].join("\n");
}

// No event tells that ComfyUI has refused a graph.
setInterval(() => {
  const errors = app.lastNodeErrors ?? null;
  if (errors === refused) return;
  refused = errors;
  clearErrors();
  for (const [id, of] of Object.entries(errors ?? {})) fail(id, messagesOf(of));
}, 250);

api.addEventListener("execution_start", clearErrors);
api.addEventListener("execution_error", ({ detail }) => {
  fail(detail.node_id, detail.exception_message.trim());
});

function addCanvas(node, name, height, draw) {
  const canvas = element("canvas", { width: "100%", height: "100%", display: "block" });
  const redraw = () => {
    const { clientWidth, clientHeight } = canvas;
    if (!clientWidth) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = clientWidth * ratio;
    canvas.height = clientHeight * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px sans-serif";
    draw(pen, clientWidth, clientHeight, colorsOf(view));
  };
  const view = addView(node, name, height, redraw);
  view.append(canvas);
  return redraw;
}

function say(pen, width, height, message, colors) {
  pen.fillStyle = colors.grey;
  pen.textAlign = "center";
  pen.fillText(message, width / 2, height / 2);
}

/** A message as lines that fit a width. */
function wrapped(pen, message, width) {
  const lines = [""];
  for (const word of message.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (pen.measureText(longer).width <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

/** Writes at the first of some places, [x, y] of its middle, where nothing in `taken` stands; what is
 * optional, only there. */
function write(pen, taken, message, places, optional = false) {
  const width = pen.measureText(message).width + 4;
  const boxes = places.map(([x, y]) => [x - width / 2, y - 11, x + width / 2, y + 3]);
  const free = ([left, top, right, bottom]) =>
    !taken.some(([l, t, r, b]) => left < r && l < right && top < b && t < bottom);
  let at = boxes.findIndex(free);
  if (at < 0 && optional) return;
  at = Math.max(0, at);
  taken.push(boxes[at]);
  pen.textAlign = "center";
  pen.fillText(message, ...places[at]);
}

/** A node by its id; of one in a subgraph, "12:5": node 5 of what node 12 (or its id) holds. */
function nodeOf(id) {
  const path = String(id).split(":");
  const last = path.pop();
  let graph = app.graph;
  for (const step of path) {
    graph = graph?.getNodeById(step)?.subgraph ?? app.graph.subgraphs?.get(step);
  }
  return graph?.getNodeById(last);
}

function widgetValue(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

/** The numbers of a ring as they stand in the node's widgets now, automatic ones as last run. */
function ringOf(node, geometry) {
  const pick = (name, auto) => {
    const value = widgetValue(node, name);
    return value === undefined || value === auto ? geometry[name] : value;
  };
  return { s1: pick("s1", -1), s2: pick("s2", -1), d1: pick("d1", 0), d2: pick("d2", 0) };
}

// ------------------------------------------------------------------------ inputs

const AUTOMATIC = { s1: -1, s2: -1, d1: 0, d1_anchor: 0, d2: 0 }; // a widget's value for automatic
// Smallest and largest cosine of neighbours, by their source: what automatic stands for.
const COSINES = {
  vocabulary: [0.55, 1],
  predictions: [0.3, 1],
  bank: [0.3, 0.7],
  isotropic: [0.3, 0.7],
};

const isAutomatic = ({ name, value }) => value === AUTOMATIC[name];

function isLinked(node, { name }) {
  return node.inputs.some(({ widget, link }) => widget?.name === name && link != null);
}

/** Adds a widget of the page alone, which is neither saved nor sent. */
function addControl(node, type, value, callback, options = {}) {
  const control = node.addWidget(type, `realera_${type}`, value, callback, options);
  control.serialize = control.options.serialize = false;
  return control;
}

/** Adds a switch that hides the numbers of a ring while all are automatic. Switched off, it shows
 * what was mined last, or else the default of the source. */
function addAutomatic(node) {
  const numbers = node.widgets.filter(({ name }) => name in AUTOMATIC);
  const control = addControl(node, "toggle", true, (automatic) => {
    const geometry = node.realeraGeometry;
    const source = widgetValue(node, "source") ?? geometry?.source;
    const [s2, s1] = COSINES[source] ?? [];
    const known = { s1, s2, ...(geometry?.source === source ? geometry : {}) };
    if (widgetValue(node, "source") == null && geometry) known.s2 = geometry.farthest ?? known.s2;
    for (const widget of numbers) {
      if (automatic) widget.value = AUTOMATIC[widget.name];
      else if (isAutomatic(widget)) widget.value = known[widget.name] ?? widget.value;
      widget.callback?.(widget.value);
    }
    node.realeraArrange();
  });
  control.label = text("automatic");
  control.options.advanced = true;
}

/** Shows the inputs of a node that apply: no number of a ring that is automatic, and in a classic
 * node, behind a button, the advanced ones, which Nodes 2.0 folds by itself. */
function foldInputs(node) {
  const folded = node.widgets?.filter(({ options }) => options?.advanced) ?? [];
  if (!folded.length) return;
  const automatic = node.widgets.find(({ name }) => name === "realera_toggle");
  const button = addControl(
    node,
    "button",
    null,
    () => {
      const slack = node.size[1] - node.computeSize()[1];
      node.showAdvanced = !node.showAdvanced;
      node.realeraArrange();
      node.setSize([node.size[0], node.computeSize()[1] + Math.max(0, slack)]);
    },
    { canvasOnly: true },
  );
  node.realeraArrange = () => {
    const closed = !node.showAdvanced;
    button.label = text(closed ? "unfold" : "refold");
    for (const widget of folded) {
      const without = automatic?.value && widget.name in AUTOMATIC;
      const hidden = (closed || without) && !isLinked(node, widget);
      widget.hidden = widget.options.hidden = hidden && (without || !LiteGraph.vueNodesMode);
      // Some frontends keep room for what is not shown, unless it needs none.
      if (hidden) widget.computeSize = () => [0, -4];
      else delete widget.computeSize;
    }
    app.graph?.setDirtyCanvas(true, true);
  };
  const { onConfigure, onConnectionsChange } = node;
  node.onConfigure = function (saved) {
    onConfigure?.call(this, saved);
    const numbers = this.widgets.filter(({ name }) => name in AUTOMATIC);
    if (automatic) automatic.value = numbers.every((one) => isAutomatic(one) && !isLinked(this, one));
    this.realeraArrange();
  };
  node.onConnectionsChange = function (...change) {
    onConnectionsChange?.apply(this, change);
    this.realeraArrange();
  };
  node.realeraArrange();
}

// ------------------------------------------------------------------------ the neighbourhood

function drawPoints(pen, width, height, colors, taken, geometry, ring) {
  // The plane of the centre of cosines, left, and the concept, in the middle.
  const reach = 1.15 * Math.max(ring.d2, geometry.radius);
  const scale = Math.min(width, height) / (2 * reach);
  const x = (along) => width / 2 + along * scale;
  const y = (across) => height / 2 - across * scale;
  const origin = x(-geometry.radius);
  const labels = []; // written last, on top of the points

  for (const [cosine, name] of [[ring.s1, "S1"], [ring.s2, "S2"]]) {
    const angle = Math.acos(Math.max(-1, Math.min(1, cosine)));
    pen.strokeStyle = colors.grey;
    pen.setLineDash([4, 4]);
    pen.beginPath();
    for (const side of [1, -1]) {
      pen.moveTo(origin, y(0));
      const far = 4 * reach * scale;
      pen.lineTo(origin + far * Math.cos(angle), y(0) - side * far * Math.sin(angle));
    }
    pen.stroke();
    const end = Math.min(0.92 * reach / Math.max(Math.sin(angle), 0.05), 1.9 * reach);
    const places = [1, 0.9, 0.8, 0.7, 0.6].map((share) => [
      origin + share * end * scale * Math.cos(angle),
      y(share * end * Math.sin(angle)),
    ]);
    labels.push([`${name} ${cosine.toFixed(2)}`, colors.grey, places]);
  }
  pen.setLineDash([]);
  for (const [distance, name, color] of [[ring.d1, "D1", colors.near], [ring.d2, "D2", colors.far]]) {
    pen.strokeStyle = color;
    pen.beginPath();
    pen.arc(x(0), y(0), distance * scale, 0, 2 * Math.PI);
    pen.stroke();
    const places = [[x(0), y(-distance) + 12], [x(0), y(-distance) - 4], [x(0), y(distance) - 4]];
    labels.push([`${name} ${distance.toFixed(1)}`, color, places]);
  }
  const dots = (points, color) => {
    pen.fillStyle = color;
    points.forEach(([along, across], k) => {
      pen.beginPath();
      pen.arc(x(along), y(k % 2 ? across : -across), 2.5, 0, 2 * Math.PI);
      pen.fill();
    });
  };
  dots(geometry.neighbors, colors.near);
  dots(geometry.beyond, colors.far);
  pen.fillStyle = colors.concept;
  pen.beginPath();
  pen.arc(x(0), y(0), 6, 0, 2 * Math.PI);
  pen.fill();
  write(pen, taken, namesOf(geometry), [[x(0), y(0) - 10]]);
  for (const [label, color, places] of labels) {
    pen.fillStyle = color;
    write(pen, taken, label, places);
  }
}

function drawWords(pen, width, height, colors, taken, geometry, ring) {
  // Words around the concept: the smaller their cosine, the farther out.
  const { words } = geometry;
  // As it was mined; once the ring is edited, as it would be. Words in it may be left undrawn.
  const struck = new Set(geometry.exclude.map(fold));
  const inside = ([word, cosine]) =>
    cosine >= ring.s2 && cosine <= ring.s1 && !struck.has(fold(word));
  const asMined = ring.s1 === geometry.s1 && ring.s2 === geometry.s2;
  const colorOf = (word) =>
    !inside(word) ? colors.far : asMined && !word[2] ? colors.grey : colors.near;
  const far = words.filter((word) => !inside(word)).slice(0, 16);
  const shown = [...words.filter(inside).slice(0, 40), ...far].sort((a, b) => b[1] - a[1]);
  const span = 1 - Math.min(ring.s2, ...shown.map(([, cosine]) => cosine));
  const [middleX, middleY] = [width / 2, height / 2];
  const [reachX, reachY] = [(0.46 * width) / span, (0.46 * height) / span];
  const least = 16 / (0.46 * Math.min(width, height)); // clear of the concept's own name
  const place = (cosine, angle, farther = 0) => {
    const distance = Math.max(1 - cosine, least * span) + farther;
    return [
      middleX + distance * reachX * Math.sin(angle),
      middleY - distance * reachY * Math.cos(angle),
    ];
  };
  pen.fillStyle = colors.concept;
  pen.font = "bold 12px sans-serif";
  write(pen, taken, namesOf(geometry), [[middleX, middleY]]);
  pen.font = "11px sans-serif";
  pen.strokeStyle = pen.fillStyle = colors.grey;
  pen.setLineDash([4, 4]);
  for (const [cosine, name] of [[ring.s1, "S1"], [ring.s2, "S2"]]) {
    if (cosine >= 1) continue;
    const away = 1 - cosine;
    pen.beginPath();
    pen.ellipse(middleX, middleY, away * reachX, away * reachY, 0, 0, 2 * Math.PI);
    pen.stroke();
    // Below its line, or above it where that would be out of the picture; words go around it.
    const [x, y] = place(cosine, Math.PI);
    write(pen, taken, `${name} ${cosine.toFixed(2)}`, [[x, y + 12 < height ? y + 12 : y - 4]]);
  }
  pen.setLineDash([]);
  const golden = Math.PI * (3 - Math.sqrt(5));
  const sides = (word) => {
    const half = pen.measureText(word).width / 2 + 3;
    return ([x, y]) => [
      Math.max(half, Math.min(width - half, x)),
      Math.max(10, Math.min(height - 4, y)),
    ];
  };
  shown.forEach((entry, k) => {
    const [word, cosine] = entry;
    const turns = Array.from({ length: 24 }, (_, turn) => golden * k + (turn * Math.PI) / 12);
    const places = [0, 12, 24, 36, 48, 60, 72].flatMap((more) =>
      turns.map((angle) => place(cosine, angle, more / Math.min(reachX, reachY))),
    );
    pen.fillStyle = colorOf(entry);
    write(pen, taken, word, places.map(sides(word)), true);
  });
}

function namesOf(geometry) {
  return geometry.concepts.map(([name]) => name).join(", ");
}

/** Runs a node and what it needs, with other values of its widgets. */
async function runAlone(node, values) {
  const { output, workflow } = await app.graphToPrompt();
  const id = Object.keys(output).find((key) => nodeOf(key) === node);
  if (!id) return;
  const needed = {};
  const need = (key) => {
    if (needed[key] || !output[key]) return;
    needed[key] = output[key];
    for (const value of Object.values(output[key].inputs)) if (Array.isArray(value)) need(value[0]);
  };
  need(id);
  const inputs = { ...needed[id].inputs };
  for (const [name, change] of Object.entries(values)) {
    if (typeof inputs[name] === "string") inputs[name] = change(inputs[name]); // else it is linked
  }
  needed[id] = { ...needed[id], inputs };
  clearErrors();
  try {
    await api.queuePrompt(0, { output: needed, workflow });
  } catch (error) {
    const refused = error.response?.node_errors?.[id];
    fail(id, refused ? messagesOf(refused) : error.message);
  }
}

const ARROW = /->|→|=>|－>/;

/** Lines of concepts, where `lineOf` gives a line anew from its concept; comments stay. */
function eachConcept(written, lineOf) {
  const lines = written.split("\n").map((line) => {
    const name = line.split(ARROW)[0].trim();
    return !name || name.startsWith("#") ? line : lineOf(name, line);
  });
  return lines.join("\n");
}

/** A button that asks for anchors, and the anchors that a run suggested, to choose from. */
function addSuggestions(node) {
  const view = node.widgets.find(({ name }) => name === "realera_neighborhood").element;
  const box = element("div", { position: "absolute", top: "4px", right: "4px", maxWidth: "60%" });
  Object.assign(box.style, { display: "flex", flexDirection: "column", alignItems: "flex-end" });
  Object.assign(box.style, { gap: "4px", maxHeight: "100%", overflowY: "auto" });
  box.className = "realera-suggestions";
  const button = (label, click) => {
    const made = element("button", {
      font: "inherit",
      color: "var(--realera-text)",
      background: "var(--comfy-input-bg, #222)",
      border: "1px solid var(--realera-grey)",
      borderRadius: "4px",
      cursor: "pointer",
    });
    made.textContent = label;
    made.addEventListener("click", click);
    return made;
  };
  const alone = (written) => eachConcept(written, (name) => name);
  const ask = button(text("suggest"), () => runAlone(node, { concepts: alone }));
  ask.title = text("suggesting");
  node.realeraSuggest = ask;
  box.append(ask);
  view.append(box);
  const choose = (concept, anchor) => {
    const widget = node.widgets.find(({ name }) => name === "concepts");
    widget.value = eachConcept(widget.value, (name, line) =>
      name === concept ? `${name} -> ${anchor}` : line,
    );
    widget.callback?.(widget.value);
    app.graph.setDirtyCanvas(true, true);
  };
  return (suggestions) => {
    const rows = suggestions.map(([concept, anchors]) => {
      const row = element("div", { display: "flex", flexWrap: "wrap", justifyContent: "flex-end" });
      Object.assign(row.style, { gap: "4px", color: "var(--realera-text)" });
      row.append(element("span", {}, `${concept} →`));
      row.append(...anchors.map((anchor) => button(anchor, () => choose(concept, anchor))));
      return row;
    });
    box.replaceChildren(ask, ...rows);
  };
}

function addNeighborhood(node, height) {
  let geometry = null;
  let said = []; // what was found, then what to be warned of
  const redraw = addCanvas(node, "realera_neighborhood", height, (pen, width, whole, colors) => {
    if (!geometry) return say(pen, width, whole, text("run"), colors);
    const lines = said.flatMap((line, k) => wrapped(pen, k ? `⚠ ${line}` : line, width - 12));
    const height = whole - 14 * lines.length;
    pen.textAlign = "left";
    pen.fillStyle = colors.text;
    lines.forEach((line, k) => pen.fillText(line, 6, height + 14 * k + 8));
    const button = node.realeraSuggest;
    const taken = button ? [[width - button.offsetWidth - 8, 0, width, button.offsetHeight + 6]] : [];
    pen.textAlign = "left";
    [[colors.near, text("near")], [colors.far, text("far")]].forEach(([color, label], k) => {
      const legend = `● ${label}`;
      pen.fillStyle = color;
      pen.fillText(legend, 6, 14 + 14 * k);
      taken.push([0, 14 * k, 10 + pen.measureText(legend).width, 18 + 14 * k]);
    });
    const draw = geometry.words.length ? drawWords : drawPoints;
    draw(pen, width, height, colors, taken, geometry, ringOf(node, geometry));
  });
  for (const widget of node.widgets.filter(({ name }) => /^[sd][12]$/.test(name))) {
    const changed = widget.callback;
    widget.callback = function (...values) {
      changed?.apply(this, values);
      redraw();
    };
  }
  const suggest = node.comfyClass === "RealEraNeighborSampler" ? addSuggestions(node) : () => {};
  return (output) => {
    if (!output.realera_geometry) return;
    [geometry] = output.realera_geometry;
    node.realeraGeometry = geometry;
    said = (output.text ?? []).map(translated);
    suggest(output.realera_suggestions ?? []);
    redraw();
  };
}

// ------------------------------------------------------------------------ the scope list

/** Upper and lower case alike, as far as the core's own comparison of words. */
function fold(word) {
  return word.toUpperCase().toLowerCase();
}

/** The nodes of a kind that a node's mined words come through, nearest first. */
function minersOf(node, kind, seen = new Set()) {
  if (!node || seen.has(node)) return [];
  seen.add(node);
  const mined = ({ name }) => ["mining", "neighbors", "beyond"].includes(name);
  const sources = (node.inputs ?? []).flatMap((input, slot) =>
    mined(input) ? [node.getInputNode(slot)] : [],
  );
  return [
    ...sources.filter((source) => source?.comfyClass === kind),
    ...sources.flatMap((source) => minersOf(source, kind, seen)),
  ];
}

/** Where a Closed-Form Edit's words are written that are to keep their meaning: what its Neighbor
 * Sampler leaves out, where it mines words, and the prompts of its Beyond Sampler. */
function keepersOf(node) {
  const find = (kind, name) =>
    minersOf(node, kind)[0]?.widgets.find((widget) => widget.name === name) ?? null;
  const source = find("RealEraNeighborSampler", "source")?.value;
  const words = source === "vocabulary" || source === "predictions";
  return {
    leaveOut: words ? find("RealEraNeighborSampler", "leave_out") : null,
    preserve: find("RealEraBeyondSampler", "preserve"),
  };
}

const COMMAS = /[,，、]/; // what parts the words that are left out, beside line ends

/** The lines of a keeper; words that are left out may have commas between them. */
function linesOf(widget) {
  const lines = (widget?.value ?? "").split("\n");
  const parts = widget?.name === "leave_out" ? lines.flatMap((line) => line.split(COMMAS)) : lines;
  return parts.map((part) => part.trim()).filter((part) => part);
}

function toggleKept(node, word) {
  const { leaveOut, preserve } = keepersOf(node);
  const wanted = COMMAS.test(word) ? preserve : (leaveOut ?? preserve);
  const holds = (widget) => linesOf(widget).some((line) => fold(line) === fold(word));
  const holders = [leaveOut, preserve].filter((widget) => widget && holds(widget));
  for (const widget of holders.length ? holders : [wanted]) {
    if (!widget) continue;
    const lines = linesOf(widget);
    const others = lines.filter((line) => fold(line) !== fold(word));
    widget.value = (others.length < lines.length ? others : [...lines, word]).join("\n");
    widget.callback?.(widget.value);
  }
  app.graph.setDirtyCanvas(true, true);
}

const ROW = 16; // pixels

/** The share that a word has lost of its meaning: as it was drawn, else as T alone tells. */
function lostOf([, , toward, , drawn]) {
  return typeof drawn === "number" ? drawn : toward;
}

function addScope(node) {
  const view = addView(node, "realera_scope", 220, () => colorsOf(view));
  const said = element("div", { color: "var(--realera-text)", padding: "4px 4px 0" });
  const hint = element("div", { color: "var(--realera-grey)", padding: "4px" });
  const list = element("div", { flex: "0 1 auto", minHeight: 0, overflowY: "auto" });
  list.className = "realera-scope";
  // Whole rows; the wheel over them is theirs, once they have the focus (ComfyUI's rule) and as
  // long as there is more of them than fits.
  list.tabIndex = -1;
  new ResizeObserver(() => keepWheel()).observe(list);
  list.style.outline = "none";
  list.style.maxHeight = `round(down, 100%, ${ROW}px)`;
  list.style.scrollSnapType = "y mandatory";
  list.addEventListener("pointerenter", () => {
    const typing = document.activeElement?.matches("input, textarea, [contenteditable]");
    if (!typing) list.focus({ preventScroll: true });
  });
  const frame = element("div", { flex: "1", minHeight: 0 });
  frame.append(list);
  const box = element("div", { display: "flex", flexDirection: "column", height: "100%" });
  box.append(said, hint, frame);
  view.append(box);
  let reaches = [];
  const keepWheel = () => {
    if (list.scrollHeight > list.clientHeight) list.dataset.captureWheel = "true";
    else delete list.dataset.captureWheel;
  };
  const strip = { boxSizing: "border-box", height: `${ROW}px`, lineHeight: `${ROW - 2}px` };
  Object.assign(strip, { overflow: "hidden", padding: "1px 4px", scrollSnapAlign: "start" });

  const fill = () => {
    const { leaveOut, preserve } = reaches.length ? keepersOf(node) : {};
    const kept = new Set([...linesOf(leaveOut), ...linesOf(preserve)].map(fold));
    hint.textContent = text(!reaches.length ? "run" : leaveOut || preserve ? "hint" : "connect");
    hint.style.textAlign = reaches.length ? "left" : "center";
    const rowOf = ([word, , toward, moved, drawn, gone, anchor]) => {
      const checked = typeof drawn === "number"; // else foretold
      const lost = lostOf([word, null, toward, moved, drawn]);
      const held = kept.has(fold(word));
      const row = element("div", { ...strip, display: "flex", gap: "6px", cursor: "pointer" });
      const percent = (share) => `${Math.round(100 * share)} %`;
      row.title = `${text("way")(percent(toward), anchor)}, ${percent(moved)} ${text("moved")}`;
      if (checked) row.title += `, ${percent(drawn)} ${text("drawn")}`;
      Object.assign(row, { role: "button", tabIndex: 0, ariaPressed: String(held) });
      const color = held ? "far" : gone ? "concept" : "near";
      const bar = element("div", { flex: "1", background: "rgba(128,128,128,.15)" });
      const share = Math.max(0, Math.min(1, lost));
      const length = { width: `${100 * share}%`, height: "100%" };
      bar.append(element("div", { ...length, background: `var(--realera-${color})` }));
      const name = element("span", { width: "42%", overflow: "hidden", whiteSpace: "nowrap" }, word);
      name.style.color = `var(--realera-${held ? "far" : "text"})`;
      const number = { width: "48px", textAlign: "right", color: "var(--realera-text)" };
      row.append(name, bar, element("span", number, `${checked ? "✓ " : ""}${percent(lost)}`));
      row.addEventListener("click", () => {
        toggleKept(node, word);
        fill();
      });
      row.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        const place = [...list.children].indexOf(row);
        row.click();
        list.children[place].focus({ preventScroll: true });
      });
      return row;
    };
    const groups = Object.values(Object.groupBy(reaches, ([, concept]) => concept));
    const rows = groups.flatMap((group) => {
      const [[, concept, , , , , anchor]] = group;
      const shown = group.toSorted((one, other) => lostOf(other) - lostOf(one)).map(rowOf);
      if (groups.length < 2) return shown;
      const heading = element("div", strip, `${concept} → ${anchor}`);
      heading.style.color = "var(--realera-concept)";
      return [heading, ...shown];
    });
    list.replaceChildren(...rows);
    keepWheel();
  };
  fill();
  return (output) => {
    if (!output.realera_scope) return;
    reaches = output.realera_scope;
    said.textContent = output.text?.map(translated).join(" ") ?? "";
    fill();
  };
}

// ------------------------------------------------------------------------ where it was saved

function addSaved(node) {
  const view = addView(node, "realera_saved", 36, () => colorsOf(view));
  const lines = element("div", { color: "var(--realera-grey)", padding: "4px 6px" }, text("unsaved"));
  Object.assign(lines.style, { whiteSpace: "pre-wrap", overflowWrap: "anywhere" });
  Object.assign(lines.style, { lineHeight: "14px", userSelect: "text" });
  view.append(lines);
  return (output) => {
    if (!output.text) return;
    lines.textContent = lines.title = output.text.map(translated).join("\n");
    lines.style.color = "var(--realera-text)";
  };
}

// ------------------------------------------------------------------------ the loss

/** Training steps, [step, loss]: dots of both equations and their means of the last twenty. */
function addLoss(node) {
  let losses = [];
  let total = 1;
  let state = "run"; // the key of what to say
  const redraw = addCanvas(node, "realera_loss", 200, (pen, width, height, colors) => {
    if (!losses.length) return say(pen, width, height, text(state), colors);
    const highest = Math.max(...losses.map(([, loss]) => loss)) || 1;
    const label = highest.toPrecision(2);
    const [top, bottom, right] = [36, height - 20, width - 8];
    const left = 12 + pen.measureText(label).width;
    const x = (step) => left + ((right - left) * step) / total;
    const y = (loss) => bottom - ((bottom - top) * loss) / highest;
    pen.strokeStyle = pen.fillStyle = colors.grey;
    pen.strokeRect(left, top, right - left, bottom - top);
    pen.textAlign = "right";
    pen.fillText(label, left - 4, top + 8);
    pen.fillText("0", left - 4, bottom);
    const stopped = state === "stopped" ? `, ${text("stopped")}` : "";
    pen.fillText(`${text("step")(losses.at(-1)[0], total)}${stopped}`, right, height - 6);
    const kinds = [["concept", 1], ["neighbors", 0]];
    kinds.forEach(([name, odd], k) => {
      const of = losses.filter(([step]) => step % 2 === odd);
      pen.strokeStyle = pen.fillStyle = odd ? colors.concept : colors.far;
      pen.textAlign = "left";
      pen.fillText(`● ${text(name)}`, left, 14 + 14 * k);
      for (const [step, loss] of of) pen.fillRect(x(step) - 1, y(loss) - 1, 2, 2);
      pen.lineWidth = 2;
      pen.beginPath();
      of.forEach(([step], n) => {
        const last = of.slice(Math.max(0, n - 19), n + 1);
        pen.lineTo(x(step), y(last.reduce((sum, [, loss]) => sum + loss, 0) / last.length));
      });
      pen.stroke();
    });
  });
  const enter = (next) => {
    state = next;
    redraw();
  };
  node.realeraStep = ({ step, steps, loss }) => {
    if (step <= (losses.at(-1)?.[0] ?? 0)) losses = [];
    losses.push([step, loss]);
    total = steps;
    enter("running");
  };
  node.realeraStarted = () => {
    losses = [];
    enter("running");
  };
  node.realeraEnded = () => {
    if (state === "running") enter("stopped");
  };
  return (output) => {
    if (!output.realera_loss) return;
    losses = output.realera_loss;
    total = losses.at(-1)?.[0] ?? 1;
    enter("run");
  };
}

/** Frontends before 1.49 leave the last word of the progress standing. */
function dropProgress(node) {
  const progress = node.widgets?.find(({ name }) => name === "$$node-text-preview");
  if (progress) node.removeWidget(progress);
}

let running = null; // the node that ComfyUI executes

api.addEventListener("realera.step", ({ detail }) => {
  nodeOf(detail.node)?.realeraStep?.(detail);
});
api.addEventListener("executing", ({ detail }) => {
  running = detail && nodeOf(detail);
  running?.realeraStarted?.();
});
for (const end of ["execution_error", "execution_interrupted"]) {
  api.addEventListener(end, () => {
    running?.realeraEnded?.();
    if (running?.comfyClass?.startsWith("RealEra")) dropProgress(running);
  });
}

// ------------------------------------------------------------------------ before and after

// Room for four prompts: classic nodes ask the widget for it, Nodes 2.0 the style.
const PROMPTS = 96; // pixels

function addSlider(node) {
  const prompts = node.widgets.find(({ name }) => name === "prompts");
  prompts.options.getMinHeight = () => PROMPTS;
  prompts.options.getMaxHeight = () => 2 * PROMPTS; // a larger node is for the picture
  const view = addView(node, "realera_slider", 280, () => {
    colorsOf(view);
    const box = view.closest("[data-node-id]")?.querySelector("textarea"); // of Nodes 2.0
    if (box) box.style.minHeight = `${PROMPTS}px`;
  });
  view.classList.add("realera-slider");
  const box = element("div", { flexDirection: "column", height: "100%", gap: "4px" });
  Object.assign(box.style, { display: "none", boxSizing: "border-box", padding: "4px" });
  const empty = element("div", { color: "var(--realera-grey)", padding: "4px" }, text("run"));
  empty.style.textAlign = "center";
  const select = (name) => {
    const made = element("select", {
      font: "inherit",
      color: "var(--realera-text)",
      background: "var(--comfy-input-bg, #222)",
      border: "1px solid var(--realera-grey)",
      borderRadius: "4px",
      minWidth: 0,
    });
    made.className = `realera-${name}`;
    return made;
  };
  const choice = select("prompt");

  // The picture as large as its stage lets it be: all that is dragged is measured on it.
  const stage = element("div", { flex: "1", minHeight: 0, containerType: "size" });
  Object.assign(stage.style, { display: "flex", flexDirection: "column", alignItems: "center" });
  const frame = element("div", { position: "relative", touchAction: "none", cursor: "ew-resize" });
  const fit = { position: "absolute", inset: 0, width: "100%", height: "100%", maxWidth: "none" };
  Object.assign(fit, { imageRendering: "pixelated", pointerEvents: "none", userSelect: "none" });
  const [before, after] = [element("img", fit), element("img", fit)]; // left and right
  for (const image of [before, after]) image.draggable = false;
  const line = element("div", { position: "absolute", top: 0, bottom: 0, width: "2px" });
  Object.assign(line.style, { marginLeft: "-1px", background: "#fff", pointerEvents: "none" });
  line.style.boxShadow = "0 0 0 1px rgba(0, 0, 0, .5)";
  const below = element("div", { width: "100%", position: "absolute", top: "100%" });
  // Each image's model, and what the classifier sees in it.
  const names = element("div", { display: "flex", justifyContent: "space-between", gap: "8px" });
  const verdicts = element("div", { color: "var(--realera-text)" });
  Object.assign(verdicts.style, { display: "flex", justifyContent: "space-between", gap: "8px" });
  Object.assign(verdicts.style, { height: "14px", lineHeight: "14px", whiteSpace: "nowrap" });
  verdicts.className = "realera-verdicts";
  const sides = ["left", "right"].map((side) => {
    const model = select(side);
    model.ariaLabel = text(side);
    const verdict = element("span", { overflow: "hidden", textOverflow: "ellipsis" });
    names.append(model);
    verdicts.append(verdict);
    model.addEventListener("change", () => show());
    return { model, verdict };
  });
  const slider = element("input", { width: "100%", margin: 0, display: "block" });
  Object.assign(slider, { type: "range", min: 0, max: 100, step: "any", value: 50 });
  slider.ariaLabel = `${text("left")} / ${text("right")}`;
  below.append(names, verdicts, slider);
  frame.append(before, after, line, below);
  stage.append(frame);
  box.append(choice, stage);
  view.append(empty, box);

  let rows = []; // of each image: its prompt, and every model's file and verdict
  const url = ({ filename, subfolder, type }) =>
    api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  const cut = () => {
    after.style.clipPath = `inset(0 0 0 ${slider.value}%)`;
    line.style.left = `${slider.value}%`;
  };
  const show = () => {
    const row = rows[choice.selectedIndex];
    if (!row) return;
    [before, after].forEach((image, side) => {
      const { model, verdict } = sides[side];
      image.src = url(row.files[model.selectedIndex]);
      verdict.textContent = verdict.title = row.verdicts[model.selectedIndex] ?? "";
    });
  };
  before.addEventListener("load", () => {
    const { naturalWidth, naturalHeight } = before;
    const under = "56px"; // the names, the verdicts and the slider
    frame.style.width = `min(100cqw, (100cqh - ${under}) * ${naturalWidth / naturalHeight})`;
    frame.style.aspectRatio = `${naturalWidth} / ${naturalHeight}`;
  });
  const follow = ({ clientX }) => {
    const { left, width } = frame.getBoundingClientRect();
    slider.value = Math.max(0, Math.min(100, (100 * (clientX - left)) / width));
    cut();
  };
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.target === slider) return;
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    follow(event);
  });
  frame.addEventListener("pointermove", (event) => {
    if (frame.hasPointerCapture(event.pointerId)) follow(event);
  });
  slider.addEventListener("input", cut);
  choice.addEventListener("change", show);
  cut();
  return (output) => {
    if (!output.realera_images?.length) return;
    rows = output.realera_images;
    choice.replaceChildren(
      ...rows.map(({ prompt }, k) => element("option", {}, `${k + 1}: ${prompt}`)),
    );
    sides.forEach(({ model }, side) => {
      model.replaceChildren(...output.realera_models.map((name) => element("option", {}, name)));
      model.selectedIndex = side;
    });
    empty.style.display = "none";
    box.style.display = "flex";
    show();
  };
}

const VIEWS = {
  RealEraNeighborSampler: (node) => addNeighborhood(node, 220),
  RealEraBeyondSampler: (node) => addNeighborhood(node, 160),
  RealEraClosedFormEdit: addScope,
  RealEraLoraAlign: addLoss,
  RealEraCompare: addSlider,
  RealEraSaveErasure: addSaved,
  RealEraSaveErasedCheckpoint: addSaved,
};

/** Gives a node's empty widgets their hints, and combos their values, in the user's language. */
function translateWidgets(node) {
  for (const [name, labels] of Object.entries(OPTIONS[locale()] ?? {})) {
    const widget = node.widgets?.find((one) => one.name === name);
    if (widget) widget.options.getOptionLabel = (value) => labels[value] ?? value ?? "";
  }
  for (const [name, hint] of Object.entries(PLACEHOLDERS[locale()] ?? {})) {
    const widget = node.widgets?.find((one) => one.name === name);
    if (!widget) continue;
    widget.options.placeholder = hint;
    if (widget.element) widget.element.placeholder = hint;
  }
}

// ------------------------------------------------------------------------ the cache

const CACHE_SIZE = 8; // gigabytes

async function askCache(method, body) {
  const answer = await api.fetchApi("/realera/cache", { method, body: JSON.stringify(body) });
  return answer.json();
}

async function emptyCache() {
  const { folder, bytes } = await askCache("GET");
  const { files } = await askCache("DELETE");
  const detail = text("emptied")(files, (bytes / 1e6).toFixed(1), folder);
  app.extensionManager.toast.add({ severity: "success", summary: "RealEra", detail, life: 8000 });
}

app.registerExtension({
  name: "realera.views",
  commands: [
    {
      id: "RealEra.EmptyCache",
      label: "Empty RealEra's cache",
      icon: "pi pi-trash",
      function: emptyCache,
    },
  ],
  menuCommands: [{ path: ["Extensions", "RealEra"], commands: ["RealEra.EmptyCache"] }],
  settings: [
    {
      id: "RealEra.CacheSize",
      category: ["RealEra", "Cache", "Size"],
      name: "Size of the cache in GB",
      tooltip:
        "What a text encoder makes of its vocabulary, so that the next concept takes seconds. The least recently used files are removed first. REALERA_CACHE names the folder.",
      type: "number",
      attrs: { min: 0, max: 1000 },
      defaultValue: CACHE_SIZE,
      onChange(gigabytes, before) {
        // At the page's start, only what the user has set: REALERA_CACHE_GB may say otherwise.
        if (before !== undefined || gigabytes !== CACHE_SIZE) askCache("POST", { gigabytes });
      },
    },
  ],
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("RealEra")) return;
    translateWidgets(node);
    const add = VIEWS[node.comfyClass];
    if (node.widgets?.some(({ name }) => name in AUTOMATIC)) addAutomatic(node);
    foldInputs(node);
    if (!add) return;
    node.realeraShow = add(node);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      dropProgress(this);
      if (output) this.realeraShow(output); // a node from the cache may have none
    };
  },
  setup() {
    app.ui.settings.addEventListener("Comfy.VueNodes.Enabled.change", () => {
      for (const node of app.graph?.nodes ?? []) node.realeraArrange?.();
    });
  },
  /** Another tab, language or past run has made the nodes anew: show what they had shown. */
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      if (output) nodeOf(id)?.realeraShow?.(output);
    }
  },
});
