"use strict";
// Three linked canvases: clean image, adversarial image, perturbation. NiiVue is run, and volumes are decoded, only
// when the reader opens the viewer.
(() => {
  const byId = (id) => document.getElementById(id);
  const panel = byId("viewer-panel");
  const { scenes, classes } = JSON.parse(byId("viewer-data").textContent);
  const pick = Object.fromEntries(["subject", "victim", "setting", "modality", "overlay", "plane"].map(
    (name) => [name, byId("viewer-" + name)]));
  const opacity = byId("viewer-opacity");
  const outline = byId("viewer-outline");
  const canvases = ["clean", "adversarial", "perturbation"].map((name) => byId("viewer-canvas-" + name));
  let viewers = null;
  let shown = "";
  let queue = Promise.resolve();

  function say(text, state) {
    byId("viewer-status").textContent = text;
    byId("viewer-status").hidden = !text;
    panel.dataset.state = state;
  }

  function options(select, values) {
    const before = select.value;
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.includes(before)) select.value = before;
    select.closest("label").hidden = values.length < 2;
  }

  const unique = (values) => [...new Set(values)];
  const scene = () => scenes.find((s) => s.subject === pick.subject.value && s.victim === pick.victim.value);

  function choices() {
    options(pick.subject, unique(scenes.map((s) => s.subject)));
    options(pick.victim, unique(scenes.filter((s) => s.subject === pick.subject.value).map((s) => s.victim)));
    options(pick.setting, scene().settings.map((s) => s.name));
    options(pick.modality, scene().modalities.map((m) => m.name));
  }

  function strongest(here) { // the setting that leaves the least Dice
    const left = (setting) => Object.values(setting.dice).reduce((sum, [, after]) => sum + (after ?? 1), 0);
    return here.settings.reduce((best, setting) => (left(setting) < left(best) ? setting : best)).name;
  }

  function volume(index, name) {
    return niivue.NVImage.loadFromBase64({ base64: byId("volume-" + index).textContent, name: name + ".nii.gz" });
  }

  async function grey(modality) {
    const image = await volume(modality.volume, "clean");
    image.colormap = "gray";
    [image.cal_min, image.cal_max] = modality.window;
    return image;
  }

  async function changed(modality, change) { // the adversarial image: clean + perturbation
    const image = await grey(modality);
    const delta = await volume(change.volume, "perturbation");
    const { scl_slope: a, scl_inter: b } = image.hdr;
    const { scl_slope: c, scl_inter: d } = delta.hdr;
    const sum = new Float32Array(image.img.length);
    for (let i = 0; i < sum.length; i++) sum[i] = image.img[i] * a + b + delta.img[i] * c + d;
    image.img = sum;
    Object.assign(image.hdr, { datatypeCode: 16, numBitsPerVoxel: 32, scl_slope: 1, scl_inter: 0 });
    image.calMinMax();
    [image.cal_min, image.cal_max] = modality.window;
    return image;
  }

  async function difference(change) {
    const image = await volume(change.volume, "perturbation");
    image.colormap = "change";
    [image.cal_min, image.cal_max] = [-change.scale, change.scale];
    return image;
  }

  async function mask(index) {
    const image = await volume(index, "labels");
    const size = 1 + Math.max(...classes.map((c) => c.index));
    const table = { R: [], G: [], B: [], A: [], I: [], labels: [] };
    for (let i = 0; i < size; i++) {
      const found = classes.find((c) => c.index === i);
      const rgb = found ? [1, 3, 5].map((at) => parseInt(found.colour.slice(at, at + 2), 16)) : [0, 0, 0];
      table.R.push(rgb[0]); table.G.push(rgb[1]); table.B.push(rgb[2]);
      table.A.push(found ? 255 : 0); table.I.push(i); table.labels.push(found ? found.name : "");
    }
    image.setColormapLabel(table);
    image.opacity = Number(opacity.value);
    return image;
  }

  function words(setting, change) {
    const dice = Object.entries(setting.dice).map(([region, [before, after]]) =>
      `${region} ${before === null ? "-" : before.toFixed(3)} → ${after === null ? "-" : after.toFixed(3)}`);
    const units = { std: " standard deviations", range: " of the robust range", absolute: "" }[setting.units];
    const own = units ? ` = ±${change.size.toPrecision(2)}${units}` : "";
    byId("viewer-dice").textContent = dice.length ? `Dice, clean → attacked: ${dice.join(", ")}.` : "";
    byId("viewer-scale").textContent = `blue darker, yellow brighter than the clean image; full colour at ±${change.scale.toPrecision(3)} scanner units${own}`;
    byId("viewer-moved").hidden = !setting.moved;
  }

  async function show() {
    const here = scene();
    const setting = here.settings.find((s) => s.name === pick.setting.value);
    const channel = here.modalities.findIndex((m) => m.name === pick.modality.value);
    const modality = here.modalities[channel];
    const change = setting.changes[channel];
    const masks = { none: [null, null], truth: [here.truth, setting.truth],
      prediction: [here.prediction, setting.prediction] }[pick.overlay.value];
    panel.dataset.state = "loading";
    const stacks = [
      [await grey(modality), masks[0] === null ? null : await mask(masks[0])],
      [await changed(modality, change), masks[1] === null ? null : await mask(masks[1])],
      [await difference(change), null],
    ];
    viewers.forEach((viewer, at) => {
      while (viewer.volumes.length) viewer.removeVolume(viewer.volumes[viewer.volumes.length - 1]);
      stacks[at].filter(Boolean).forEach((image) => viewer.addVolume(image));
    });
    const now = [here.subject, here.victim, setting.name].join("\n");
    if (now !== shown) {
      viewers.forEach((viewer) => { viewer.scene.crosshairPos = viewer.mm2frac(setting.at); });
      shown = now;
    }
    words(setting, change);
    plane();
    say("", "ready");
  }

  function plane() {
    const kinds = { multi: "MULTIPLANAR", axial: "AXIAL", coronal: "CORONAL", sagittal: "SAGITTAL" };
    viewers.forEach((viewer) => {
      viewer.setAtlasOutline(outline.checked ? 1 : 0);
      viewer.setSliceType(niivue.SLICE_TYPE[kinds[pick.plane.value]]);
    });
  }

  function refresh() {
    queue = queue.then(show).catch((error) => {
      console.error(error);
      say(`The viewer failed: ${error.message}. The pictures below show one slice of each attacked subject.`, "failed");
    });
  }

  async function start() {
    if (!document.createElement("canvas").getContext("webgl2")) {
      byId("viewer-body").hidden = true;
      say("This browser offers no WebGL 2, which the viewer needs. The pictures below show one slice of each attacked " +
        "subject.", "unavailable");
      return;
    }
    say("Opening ...", "loading");
    const script = document.createElement("script");
    script.textContent = byId("niivue-script").textContent;
    document.head.append(script);
    viewers = canvases.map(() => new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [1, 0.85, 0.2, 0.7], crosshairWidth: 0.5, crosshairGap: 3, isRadiologicalConvention: true,
      multiplanarShowRender: niivue.SHOW_RENDER.NEVER, dragAndDropEnabled: false, scrollRequiresFocus: true,
      loadingText: "", logLevel: "error", isNearestInterpolation: true, tileMargin: 2,
    }));
    for (let i = 0; i < viewers.length; i++) {
      await viewers[i].attachToCanvas(canvases[i], false);
      viewers[i].addColormap("change", { R: [60, 0, 0, 200, 255], G: [190, 90, 0, 60, 220], B: [255, 230, 0, 20, 90],
        A: [255, 255, 255, 255, 255], I: [0, 64, 128, 192, 255] });
      viewers[i].broadcastTo(viewers.filter((_, other) => other !== i), { "2d": true, "3d": true });
      viewers[i].onLocationChange = (location) => {
        byId("viewer-where").textContent = `crosshair at ${[...location.mm].slice(0, 3).map((v) => v.toFixed(0)).join(", ")} mm`;
      };
    }
    choices();
    pick.setting.value = strongest(scene());
    for (const name of ["subject", "victim", "setting"]) {
      pick[name].addEventListener("change", () => { choices(); refresh(); });
    }
    for (const control of [pick.modality, pick.overlay]) control.addEventListener("change", refresh);
    for (const control of [pick.plane, outline]) control.addEventListener("change", plane);
    opacity.addEventListener("input", () => viewers.forEach((viewer) => {
      if (viewer.volumes.length > 1) viewer.setOpacity(1, Number(opacity.value));
    }));
    refresh();
  }

  let started = false;
  panel.addEventListener("toggle", () => {
    if (!panel.open || started) return;
    started = true;
    start().catch((error) => {
      console.error(error);
      say(`The viewer could not be started: ${error.message}. The pictures below show one slice of each attacked ` +
        "subject.", "failed");
    });
  });
  const wanted = () => { if (location.hash === "#viewer") panel.open = true; };
  addEventListener("hashchange", wanted);
  wanted();
})();
