// RealEra in the page: the neighbourhood, the scope list, the live loss, before and after.
// Each view is a widget under its node and shows what the node sent when it ran.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const CONCEPT = "#d1495b";
const NEAR = "#edae49";
const FAR = "#6c8ebf";
const GREY = "#8a8a8a";

const TEXTS = {
  en: {
    run: "Run the graph to see this.",
    hint: "Click a word that is to keep its meaning, and run again.",
    connect: "Connect a Beyond Sampler to keep the meaning of a prompt.",
    near: "become the anchor",
    far: "keep their meaning",
    before: "before",
    after: "after",
    step: "step",
    loss: "loss",
  },
  zh: {
    run: "运行工作流后显示。",
    hint: "点击应保持原意的词语，然后重新运行。",
    connect: "连接“外围采样器”后才能保留提示词。",
    near: "变为锚点",
    far: "保持原意",
    before: "之前",
    after: "之后",
    step: "步",
    loss: "损失",
  },
};

function text(key) {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return (TEXTS[locale] ?? TEXTS.en)[key];
}

function element(tag, style = {}, content = "") {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  made.textContent = content;
  return made;
}

/** Adds a view of a fixed height under a node; it is neither saved nor sent. */
function addView(node, name, content, height) {
  const options = { serialize: false, hideOnZoom: false };
  const widget = node.addDOMWidget(name, name, content, {
    ...options,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  return widget;
}

function addCanvas(node, name, height, draw) {
  const canvas = element("canvas", { width: "100%", height: "100%", display: "block" });
  addView(node, name, canvas, height);
  const redraw = () => {
    const { clientWidth, clientHeight } = canvas;
    if (!clientWidth) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = clientWidth * ratio;
    canvas.height = clientHeight * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px sans-serif";
    draw(pen, clientWidth, clientHeight);
  };
  new ResizeObserver(redraw).observe(canvas);
  return { canvas, redraw };
}

function say(pen, width, height, message) {
  pen.fillStyle = GREY;
  pen.textAlign = "center";
  pen.fillText(message, width / 2, height / 2);
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

// ------------------------------------------------------------------------ the neighbourhood

function drawPoints(pen, width, height, geometry, ring) {
  // The plane of the centre of cosines, left, and the concept, in the middle.
  const reach = 1.15 * Math.max(ring.d2, geometry.radius);
  const scale = Math.min(width, height) / (2 * reach);
  const x = (along) => width / 2 + along * scale;
  const y = (across) => height / 2 - across * scale;
  const origin = x(-geometry.radius);

  for (const [cosine, name] of [[ring.s1, "S1"], [ring.s2, "S2"]]) {
    const angle = Math.acos(Math.max(-1, Math.min(1, cosine)));
    pen.strokeStyle = GREY;
    pen.setLineDash([4, 4]);
    pen.beginPath();
    for (const side of [1, -1]) {
      pen.moveTo(origin, y(0));
      const far = 4 * reach * scale;
      pen.lineTo(origin + far * Math.cos(angle), y(0) - side * far * Math.sin(angle));
    }
    pen.stroke();
    const label = Math.min(0.92 * reach / Math.max(Math.sin(angle), 0.05), 1.9 * reach);
    pen.fillStyle = GREY;
    pen.textAlign = "center";
    const at = [origin + label * scale * Math.cos(angle), y(label * Math.sin(angle))];
    pen.fillText(`${name} ${cosine.toFixed(2)}`, ...at);
  }
  pen.setLineDash([]);
  for (const [distance, name, color] of [[ring.d1, "D1", NEAR], [ring.d2, "D2", FAR]]) {
    pen.strokeStyle = pen.fillStyle = color;
    pen.beginPath();
    pen.arc(x(0), y(0), distance * scale, 0, 2 * Math.PI);
    pen.stroke();
    pen.textAlign = "center";
    pen.fillText(`${name} ${distance.toFixed(1)}`, x(0), y(-distance) + 12);
  }
  const dots = (points, color) => {
    pen.fillStyle = color;
    points.forEach(([along, across], k) => {
      pen.beginPath();
      pen.arc(x(along), y(k % 2 ? across : -across), 2.5, 0, 2 * Math.PI);
      pen.fill();
    });
  };
  dots(geometry.neighbors, NEAR);
  dots(geometry.beyond, FAR);
  pen.fillStyle = CONCEPT;
  pen.beginPath();
  pen.arc(x(0), y(0), 6, 0, 2 * Math.PI);
  pen.fill();
  pen.fillText(geometry.concepts.map(([name]) => name).join(", "), x(0), y(0) - 10);
}

function drawWords(pen, width, height, geometry, ring) {
  // Words around the concept: the smaller their cosine, the farther out.
  const { words } = geometry;
  // As it was mined; once the ring is edited, as it would be. Words in it may be left undrawn.
  const struck = new Set(geometry.exclude.map((word) => word.toLowerCase()));
  const inside = ([word, cosine]) =>
    cosine >= ring.s2 && cosine <= ring.s1 && !struck.has(word.toLowerCase());
  const asMined = ring.s1 === geometry.s1 && ring.s2 === geometry.s2;
  const colorOf = (word) => (!inside(word) ? FAR : asMined && !word[2] ? GREY : NEAR);
  const far = words.filter((word) => !inside(word)).slice(0, 16);
  const shown = [...words.filter(inside).slice(0, 40), ...far].sort((a, b) => b[1] - a[1]);
  const span = 1 - Math.min(ring.s2, ...shown.map(([, cosine]) => cosine));
  const wide = Math.max(1, width / height);
  const scale = (0.46 * Math.min(width, height)) / span;
  const middle = [width / 2, height / 2];
  pen.strokeStyle = pen.fillStyle = GREY;
  pen.setLineDash([4, 4]);
  pen.textAlign = "center";
  for (const [cosine, name] of [[ring.s1, "S1"], [ring.s2, "S2"]]) {
    if (cosine >= 1) continue;
    pen.beginPath();
    pen.ellipse(...middle, wide * (1 - cosine) * scale, (1 - cosine) * scale, 0, 0, 2 * Math.PI);
    pen.stroke();
    pen.fillText(`${name} ${cosine.toFixed(2)}`, middle[0], middle[1] + (1 - cosine) * scale + 12);
  }
  pen.setLineDash([]);
  const golden = Math.PI * (3 - Math.sqrt(5));
  shown.forEach((entry, k) => {
    const [word, cosine] = entry;
    const distance = Math.max((1 - cosine) * scale, 16); // clear of the concept's own name
    const x = middle[0] + wide * distance * Math.sin(golden * k);
    const y = middle[1] - distance * Math.cos(golden * k);
    pen.fillStyle = colorOf(entry);
    pen.fillText(word, x, y);
  });
  pen.fillStyle = CONCEPT;
  pen.font = "bold 12px sans-serif";
  pen.fillText(geometry.concepts.map(([name]) => name).join(", "), ...middle);
}

function addNeighborhood(node) {
  let geometry = null;
  const { redraw } = addCanvas(node, "realera_neighborhood", 280, (pen, width, height) => {
    if (!geometry) return say(pen, width, height, text("run"));
    const draw = geometry.words.length ? drawWords : drawPoints;
    draw(pen, width, height, geometry, ringOf(node, geometry));
    pen.textAlign = "left";
    pen.font = "11px sans-serif";
    [[NEAR, text("near")], [FAR, text("far")]].forEach(([color, label], k) => {
      pen.fillStyle = color;
      pen.fillText(`● ${label}`, 6, 14 + 14 * k);
    });
  });
  for (const widget of node.widgets.filter(({ name }) => /^[sd][12]$/.test(name))) {
    const changed = widget.callback;
    widget.callback = function (...values) {
      changed?.apply(this, values);
      redraw();
    };
  }
  return (output) => {
    if (!output.realera_geometry) return;
    [geometry] = output.realera_geometry;
    redraw();
  };
}

// ------------------------------------------------------------------------ the scope list

/** Where a Closed-Form Edit's words are written that are to keep their meaning: what its Neighbor
 * Sampler leaves out, where it mines words, and the prompts of its Beyond Sampler. */
function keepersOf(node) {
  const find = (input, kind, name) => {
    const slot = node.inputs.findIndex((one) => one.name === input);
    const source = slot < 0 ? null : node.getInputNode(slot);
    return source?.comfyClass === kind ? source.widgets.find((w) => w.name === name) : null;
  };
  const words = find("neighbors", "RealEraNeighborSampler", "source")?.value === "vocabulary";
  return {
    leaveOut: words ? find("neighbors", "RealEraNeighborSampler", "leave_out") : null,
    preserve: find("beyond", "RealEraBeyondSampler", "preserve"),
  };
}

/** The lines of a keeper; words that are left out may have commas between them. */
function linesOf(widget) {
  const text = widget?.value ?? "";
  const lines = (widget?.name === "leave_out" ? text.replaceAll(",", "\n") : text).split("\n");
  return lines.map((line) => line.trim()).filter((line) => line);
}

function toggleKept(node, word) {
  const { leaveOut, preserve } = keepersOf(node);
  const widget = word.includes(",") ? preserve : (leaveOut ?? preserve); // commas part leave_out
  if (!widget) return;
  const lines = linesOf(widget);
  const others = lines.filter((line) => line !== word);
  widget.value = (others.length < lines.length ? others : [...lines, word]).join("\n");
  widget.callback?.(widget.value);
  app.graph.setDirtyCanvas(true, true);
}

function addScope(node) {
  const list = element("div", { overflowY: "auto", fontSize: "11px", height: "100%" });
  list.className = "realera-scope";
  list.append(element("div", { color: GREY, textAlign: "center" }, text("run")));
  addView(node, "realera_scope", list, 300);
  let reaches = [];

  const fill = () => {
    const { leaveOut, preserve } = keepersOf(node);
    const kept = new Set([...linesOf(leaveOut), ...linesOf(preserve)]);
    const hint = leaveOut || preserve ? text("hint") : text("connect");
    list.replaceChildren(element("div", { color: GREY, padding: "2px 4px" }, hint));
    for (const [word, concept, toward, moved] of reaches) {
      const row = element("div", { display: "flex", gap: "6px", padding: "1px 4px" });
      row.style.cursor = "pointer";
      row.title = `${Math.round(100 * toward)} % → ${concept}, ${Math.round(100 * moved)} % moved`;
      const color = kept.has(word) ? FAR : toward >= 0.5 ? CONCEPT : NEAR;
      const bar = element("div", { flex: "1", background: "rgba(128,128,128,.15)" });
      const share = Math.max(0, Math.min(1, toward));
      bar.append(element("div", { width: `${100 * share}%`, height: "100%", background: color }));
      const name = element("span", { width: "42%", overflow: "hidden", whiteSpace: "nowrap" }, word);
      name.style.color = kept.has(word) ? FAR : "inherit";
      row.append(name, bar, element("span", { width: "34px", textAlign: "right" }));
      row.lastChild.textContent = `${Math.round(100 * toward)} %`;
      row.addEventListener("click", () => {
        toggleKept(node, word);
        fill();
      });
      list.append(row);
    }
  };
  return (output) => {
    if (!output.realera_scope) return;
    reaches = output.realera_scope;
    fill();
  };
}

// ------------------------------------------------------------------------ the loss

function addLoss(node) {
  let steps = [];
  let total = 1;
  const { redraw } = addCanvas(node, "realera_loss", 200, (pen, width, height) => {
    if (!steps.length) return say(pen, width, height, text("run"));
    const left = 8;
    const bottom = height - 18;
    const top = Math.max(...steps.map(({ loss }) => loss)) || 1;
    const x = (step) => left + ((width - 2 * left) * step) / total;
    const y = (loss) => bottom - ((bottom - 16) * loss) / top;
    pen.strokeStyle = GREY;
    pen.strokeRect(left, 16, width - 2 * left, bottom - 16);
    for (const { step, loss } of steps) {
      pen.fillStyle = step % 2 ? NEAR : FAR;
      pen.fillRect(x(step) - 1, y(loss) - 1, 2.5, 2.5);
    }
    pen.strokeStyle = CONCEPT;
    pen.lineWidth = 2;
    pen.beginPath();
    let mean = 0;
    steps.forEach(({ step, loss }, k) => {
      mean += (loss - mean) / Math.min(k + 1, 20);
      pen.lineTo(x(step), y(mean));
    });
    pen.stroke();
    const last = steps.at(-1);
    pen.fillStyle = GREY;
    pen.textAlign = "left";
    const label = `${text("step")} ${last.step} / ${total}, ${text("loss")} ${mean.toFixed(4)}`;
    pen.fillText(label, left, height - 4);
  });
  node.realeraStep = (made) => {
    if (made.step <= (steps.at(-1)?.step ?? 0)) steps = [];
    steps.push(made);
    total = made.steps;
    redraw();
  };
  return (output) => {
    if (!output.realera_loss) return;
    steps = output.realera_loss.map(([step, loss]) => ({ step, loss }));
    total = steps.at(-1)?.step ?? 1;
    redraw();
  };
}

api.addEventListener("realera.step", ({ detail }) => {
  nodeOf(detail.node)?.realeraStep?.(detail);
});

// ------------------------------------------------------------------------ before and after

function addSlider(node) {
  const box = element("div", { display: "flex", flexDirection: "column", height: "100%" });
  box.className = "realera-slider";
  const choice = element("select", { fontSize: "11px", marginBottom: "4px" });
  const stage = element("div", { position: "relative", flex: "1", overflow: "hidden" });
  const fit = { position: "absolute", width: "100%", height: "100%", objectFit: "contain" };
  const [before, after] = [element("img", fit), element("img", fit)];
  for (const image of [before, after]) image.style.imageRendering = "pixelated";
  const names = element("div", { display: "flex", justifyContent: "space-between" });
  names.style.fontSize = "11px";
  names.append(element("span", {}, text("before")), element("span", {}, text("after")));
  const slider = element("input", { width: "100%" });
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 50 });
  stage.append(before, after);
  box.append(choice, stage, names, slider);
  addView(node, "realera_slider", box, 320);

  let pairs = [];
  const url = ({ filename, subfolder, type }) =>
    api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  const cut = () => (after.style.clipPath = `inset(0 0 0 ${slider.value}%)`);
  const show = () => {
    const pair = pairs[choice.selectedIndex];
    if (!pair) return;
    before.src = url(pair.before);
    after.src = url(pair.after);
  };
  slider.addEventListener("input", cut);
  choice.addEventListener("change", show);
  cut();
  return (output) => {
    if (!output.realera_pairs) return;
    pairs = output.realera_pairs;
    choice.replaceChildren(
      ...pairs.map(({ prompt }, k) => element("option", {}, `${k + 1}: ${prompt}`)),
    );
    show();
  };
}

const VIEWS = {
  RealEraNeighborSampler: addNeighborhood,
  RealEraBeyondSampler: addNeighborhood,
  RealEraClosedFormEdit: addScope,
  RealEraLoraAlign: addLoss,
  RealEraCompare: addSlider,
};

app.registerExtension({
  name: "RealEra",
  nodeCreated(node) {
    const add = VIEWS[node.comfyClass];
    if (!add) return;
    node.realeraShow = add(node);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      if (output) this.realeraShow(output); // a node from the cache may have none
    };
  },
  /** Another tab, language or past run has made the nodes anew: show what they had shown. */
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      if (output) nodeOf(id)?.realeraShow?.(output);
    }
  },
});
