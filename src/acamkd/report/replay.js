"use strict";
// The viewer of masks over epochs. Bytes lie in the page as base64 of (epoch, image, unit, row, column) arrays.
(() => {
  const data = JSON.parse(document.getElementById("replay").textContent);
  const byId = (name) => document.getElementById(name);
  const state = { snapshot: data.epochs.length - 1, image: 0, level: 0, mask: 0, unit: 1 };
  const STOPS = [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]];
  const PALETTE = Array.from({ length: 256 }, (_, value) => {
    const place = value / 255 * (STOPS.length - 1), low = Math.min(Math.floor(place), STOPS.length - 2);
    return STOPS[low].map((start, channel) => start + (place - low) * (STOPS[low + 1][channel] - start));
  });

  function unpack(packed) {
    packed.values = Uint8Array.from(atob(packed.bytes), (letter) => letter.charCodeAt(0));
    packed.size = packed.shape.slice(1).reduce((product, side) => product * side, 1); // [image, unit, ...] -> unit x ...
    [packed.low, packed.high] = packed.values.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [255, 0]);
  }
  for (const level of data.levels) {
    for (const packed of [...Object.values(level.maps), ...Object.values(level.masks)]) unpack(packed);
    level.spatial = Object.keys(level.masks).filter((name) => level.masks[name].shape.length === 4);
  }

  const frame = (packed) => {
    const start = (state.snapshot * packed.shape[0] + state.image) * packed.size;
    return packed.values.subarray(start, start + packed.size);
  };
  const unitOf = (packed, unit) => {
    const bytes = frame(packed), count = packed.shape[1], size = bytes.length / count;
    if (unit > 0) return bytes.subarray((unit - 1) * size, unit * size);
    return Float32Array.from({ length: size }, (_, place) => {
      let sum = 0;
      for (let each = 0; each < count; each++) sum += bytes[each * size + place];
      return sum / count;
    });
  };
  function paint(canvas, values, rows, columns, low, high) {
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    values.forEach((value, place) => {
      const share = Math.round(255 * Math.min(1, Math.max(0, (value - low) / Math.max(1, high - low))));
      image.data.set([...PALETTE[share], 255], 4 * place);
    });
    context.putImageData(image, 0, 0);
  }
  const range = (packed) => byId("stretch").checked ? [packed.low, packed.high] : [0, 255];
  const percent = (value) => (value / 255).toFixed(2);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function show() {
    const level = data.levels[state.level], shown = data.images[state.image], epoch = data.epochs[state.snapshot];
    const when = epoch === 0 ? "start" : `epoch ${epoch}`;
    byId("epoch").value = state.snapshot;
    byId("epoch").setAttribute("aria-valuetext", when);
    byId("when").textContent = when;
    for (const who of ["student", "teacher"]) {
      const map = level.maps[who], [, , rows, columns] = map.shape, canvas = byId(`${who}-map`);
      paint(canvas, frame(map), rows, columns, 0, 255);
      canvas.setAttribute("aria-label", `Activation map of the ${who}, ${level.layer}, ${shown.name}, ${when}`);
    }
    for (const over of document.querySelectorAll(".over")) {
      over.style.aspectRatio = `${shown.width} / ${shown.height}`;
      const image = over.querySelector("img");
      image.src = shown.source;
      image.alt = shown.name;
    }
    const name = level.spatial[state.mask], masks = level.masks[name];
    byId("mask-view").hidden = byId("unit-view").hidden = !masks;
    if (masks) {
      const [, count, rows, columns] = masks.shape, [low, high] = range(masks), chosen = unitOf(masks, state.unit);
      const what = state.unit ? `mask ${state.unit}` : "mean of the masks";
      paint(byId("mask"), chosen, rows, columns, low, high);
      byId("mask").setAttribute("aria-label",
        `${name}, ${what}, ${level.layer}, over ${shown.name}, ${when}: mean ${percent(mean(chosen))}`);
      byId("mask-title").textContent = `${name} ${what}, ${level.layer}`;
      byId("low").textContent = percent(low);
      byId("high").textContent = percent(high);
      const gallery = byId("units");
      if (gallery.childElementCount !== count + 1) gallery.replaceChildren(...Array.from({ length: count + 1 }, (_, unit) => {
        const button = document.createElement("button"), canvas = document.createElement("canvas");
        canvas.setAttribute("aria-hidden", "true");
        button.append(canvas, document.createElement("span"));
        button.addEventListener("click", () => { state.unit = unit; show(); });
        return button;
      }));
      [...gallery.children].forEach((button, unit) => {
        const values = unitOf(masks, unit);
        paint(button.firstChild, values, rows, columns, low, high);
        button.lastChild.textContent = `${unit ? `mask ${unit}` : "mean"} · ${percent(mean(values))}`;
        button.setAttribute("aria-pressed", unit === state.unit);
      });
    }
    const channel = level.masks.channel;
    byId("channel-view").hidden = !channel;
    if (channel) {
      const [, rows, columns] = channel.shape;
      paint(byId("channel"), frame(channel), rows, columns, ...range(channel));
      byId("channel").style.height = `${16 * rows}px`;
      byId("channel").setAttribute("aria-label", `Channel masks of ${level.layer}, ${rows} masks by ${columns} channels, ${when}`);
    }
    const figures = Object.entries(level.masks).filter(([, packed]) => packed.figures).map(([kind, packed]) => {
      const [average, variation, overlap] = packed.figures[state.snapshot], line = document.createElement("span");
      const fallen = packed.collapsed[state.snapshot];
      line.className = fallen ? "bad" : "";
      line.textContent = `${kind}: mean ${average.toFixed(2)}, variation ${variation.toFixed(3)}, ` +
        `diversity ${(1 - overlap).toFixed(2)}${fallen ? " (collapsed)" : ""}. `;
      return line;
    });
    byId("now").replaceChildren(...figures);
    byId("thumbs").querySelectorAll("button").forEach((button, place) =>
      button.setAttribute("aria-pressed", place === state.image));
    for (const line of document.querySelectorAll(".cursor")) {
      const { first, last, left, width } = line.dataset, span = Math.max(1, last - first);
      const x = Number(left) + Math.min(1, Math.max(0, (epoch - first) / span)) * width;
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.removeAttribute("visibility");
    }
  }

  function choose(select, names, key) {
    select.replaceChildren(...names.map((name, place) => new Option(name, place)));
    select.value = state[key];
    select.closest("label").hidden = names.length < 2;
  }
  function changeLevel() {
    choose(byId("kind"), data.levels[state.level].spatial, "mask");
    show();
  }
  let playing = 0;
  function stop() {
    playing = clearInterval(playing) || 0;
    byId("play").textContent = "▶";
    byId("play").setAttribute("aria-label", "play");
  }
  // #epoch=3&level=1&image=0&unit=2 opens the page there: a link to what was seen.
  function follow() {
    stop();
    const wanted = new URLSearchParams(location.hash.slice(1));
    const bounded = (key, count) => Math.min(count - 1, Math.max(0, Number(wanted.get(key)) || 0));
    if (wanted.has("image")) state.image = bounded("image", data.images.length);
    if (wanted.has("level")) state.level = bounded("level", data.levels.length);
    if (wanted.has("unit")) state.unit = Number(wanted.get("unit")) || 0;
    if (wanted.has("epoch")) {
      const before = data.epochs.filter((epoch) => epoch <= Number(wanted.get("epoch"))).length;
      state.snapshot = Math.max(0, before - 1);
    }
    const masks = data.levels[state.level].masks[data.levels[state.level].spatial[state.mask]];
    state.unit = masks ? Math.min(masks.shape[1], Math.max(0, state.unit)) : 0;
    byId("level").value = state.level;
    changeLevel();
  }

  byId("thumbs").replaceChildren(...data.images.map((shown, place) => {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = shown.source;
    image.alt = `show ${shown.name}`;
    button.append(image);
    button.addEventListener("click", () => { state.image = place; show(); });
    return button;
  }));
  choose(byId("level"), data.levels.map((level) => `${level.layer} (${level.method})`), "level");
  byId("level").addEventListener("change", (event) => {
    Object.assign(state, { level: Number(event.target.value), mask: 0, unit: 1 });
    changeLevel();
  });
  byId("kind").addEventListener("change", (event) => {
    Object.assign(state, { mask: Number(event.target.value), unit: 1 });
    show();
  });
  byId("stretch").addEventListener("change", show);
  byId("epoch").max = data.epochs.length - 1;
  byId("epoch").addEventListener("input", (event) => { stop(); state.snapshot = Number(event.target.value); show(); });
  byId("play").addEventListener("click", () => {
    if (playing) return stop();
    if (state.snapshot === data.epochs.length - 1) state.snapshot = 0;
    show();
    byId("play").textContent = "❚❚";
    byId("play").setAttribute("aria-label", "pause");
    playing = setInterval(() => {
      state.snapshot += 1;
      show();
      if (state.snapshot === data.epochs.length - 1) stop();
    }, 450);
  });
  addEventListener("hashchange", follow);
  follow();
})();
