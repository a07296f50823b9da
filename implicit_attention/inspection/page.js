// Fills Bokeh's drawings for the layer, head, iteration and token that are picked. Nothing is loaded.
(async () => {
  const at = (id) => document.getElementById(id);
  const meta = JSON.parse(at("meta").textContent);
  const packed = new Blob([Uint8Array.from(atob(at("data").textContent), (c) => c.charCodeAt(0))]);
  const buffer = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const kinds = { Uint8Array, Uint16Array, Float32Array };
  const array = (name, begin = 0, count = undefined) => {
    const [kind, offset, length] = meta.arrays[name], Kind = kinds[kind];
    return new Kind(buffer, offset + begin * Kind.BYTES_PER_ELEMENT, count ?? length - begin);
  };
  while (!window.Bokeh?.documents.length) await new Promise((then) => setTimeout(then, 10));
  const model = (name) => Bokeh.documents[0].get_model_by_name(name);
  const N = meta.tokens.length, [layer, head, iteration, token] = ["layer", "head", "iteration", "token"].map(at);

  const number = (x) =>
    Number.isNaN(x) ? "does not settle" : Number.isInteger(x) ? `${x}` : Math.abs(x) < 1e-3 ? x.toExponential(3) : x.toPrecision(4);
  const paint = (name, values) => {
    const source = model(`${name}-source`);
    source.data.image[0].set(values);
    source.change.emit();
  };
  const options = (select, labels) => select.replaceChildren(...labels.map((label, i) => new Option(label, i)));

  function showLayer() {
    const it = meta.layers[layer.value];
    options(head, [...Array(it.heads).keys()].map((h) => `${h}`));
    iteration.max = it.iterations.length - 1;
    iteration.value = iteration.max;
    paint("trace", array(`trace${layer.value}`).map((r) => Math.log10(Math.max(r, 1e-16))));
    model("histogram-source").data = { left: it.edges.slice(0, -1), right: it.edges.slice(1), top: it.counts };
    showMap();
  }

  function showMap() {
    const it = meta.layers[layer.value], [rows, columns] = it.cells, size = rows * columns;
    const which = +iteration.value * it.heads + +head.value;
    paint("map", array(`maps${layer.value}`, which * size, size));
    const name = it.iterations[iteration.value];
    at("iteration-name").textContent = name === "0" ? "0, ordinary pass" : name;
    showToken();
  }

  function showToken() {
    const it = meta.layers[layer.value], i = +token.value, row = (+iteration.value * it.heads + +head.value) * N + i;
    const where = array(`where${layer.value}`, row * it.top, it.top);
    const weight = Array.from(array(`weight${layer.value}`, row * it.top, it.top), (w) => w / 65535);
    at("token-name").textContent = at("chosen").textContent = `${i}: ${meta.tokens[i]}`;
    [...at("tokens").children].forEach((button, j) => {
      const k = where.indexOf(j);
      button.setAttribute("aria-current", j === i);
      button.classList.toggle("seen", k >= 0 && weight[k] > 0);
      button.style.setProperty("--weight", k >= 0 ? weight[k] : 0);
    });
    const strip = at("tokens"), chosen = strip.children[i];
    if (chosen.offsetTop < strip.scrollTop || chosen.offsetTop + 22 > strip.scrollTop + strip.clientHeight)
      strip.scrollTop = chosen.offsetTop - strip.clientHeight / 2;
    at("seen").replaceChildren(...[...where].map((j, k) => {
      const line = document.createElement("tr"), meter = Object.assign(document.createElement("meter"), { value: weight[k] });
      [`${j}: ${meta.tokens[j] ?? ""}`, weight[k].toFixed(4)].forEach((text) => { line.insertCell().textContent = text; });
      line.insertCell().append(meter);
      return line;
    }));
    for (const name of ["gain", "fold", "steps", "residual", "plain_steps", "other_start"])
      at(name).textContent = number(array(name)[layer.value * N + i]);
    const trace = array(`trace${layer.value}`), steps = [...Array(it.taken).keys()];
    model("curve-source").data = { x: steps, y: steps.map((t) => Math.max(trace[t * N + i], 1e-16)) };
    model("tolerance").location = it.tolerance[i];
    for (const name of ["map", "trace", "strip"]) model(`${name}-span`).location = i + 0.5;
  }

  function showStrip() {
    const name = at("quantity").value, values = array(name).map((x) => (name === "residual" ? Math.log10(Math.max(x, 1e-16)) : x));
    const finite = values.filter(Number.isFinite), low = finite.reduce((a, b) => Math.min(a, b), Infinity);
    model("strip-colours").setv({ low, high: Math.max(finite.reduce((a, b) => Math.max(a, b), -Infinity), low + 1e-6) });
    paint("strip", values);
  }

  function showTheme(theme) {
    document.documentElement.dataset.theme = theme;
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    const axis = { axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: ink, major_tick_line_color: ink, minor_tick_line_color: ink };
    for (const plot of Bokeh.documents[0].roots())
      for (const part of [...plot.below, ...plot.left, ...plot.right])
        part.setv(part.color_mapper ? { major_label_text_color: ink } : axis);
  }

  const pick = (i) => { token.value = Math.min(Math.max(Math.floor(i), 0), N - 1); showToken(); };
  window.inspection = {
    point(i, which) {
      if (which !== null && which >= 0 && which < meta.layers.length) { layer.value = Math.floor(which); showLayer(); }
      if (Number.isFinite(i) && Math.floor(i) !== +token.value) pick(i);
    },
  };
  options(layer, meta.layers.map((it) => it.name));
  token.max = N - 1;
  token.value = N - 1;
  at("tokens").replaceChildren(...meta.tokens.map((text, i) => Object.assign(document.createElement("button"), { type: "button", textContent: text, tabIndex: -1, title: `token ${i}` })));
  at("tokens").tabIndex = 0;
  at("tokens").addEventListener("click", (event) => { const i = [...at("tokens").children].indexOf(event.target); if (i >= 0) pick(i); });
  layer.addEventListener("input", showLayer);
  head.addEventListener("input", showMap);
  iteration.addEventListener("input", showMap);
  token.addEventListener("input", showToken);
  at("quantity").addEventListener("input", showStrip);
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName) || event.ctrlKey || event.altKey || event.metaKey) return;
    const moves = { ArrowLeft: () => pick(+token.value - 1), ArrowRight: () => pick(+token.value + 1),
      "[": () => { iteration.stepDown(); showMap(); }, "]": () => { iteration.stepUp(); showMap(); } };
    if (moves[event.key]) { event.preventDefault(); moves[event.key](); }
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => showTheme(dark.matches ? "dark" : "light"));
  at("theme").addEventListener("click", () => showTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  showLayer();
  showStrip();
  showTheme(dark.matches ? "dark" : "light");
  document.documentElement.dataset.ready = "true";
})();
