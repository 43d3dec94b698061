"use strict";
(function () {
  const byId = (id) => document.getElementById(id);
  const all = (selector) => Array.from(document.querySelectorAll(selector));
  const config = JSON.parse(byId("config").textContent);
  const slot = "attr-engine-listening-" + config.test;
  const letters = ["x", "a", "b"];
  let state = restored() || { listener: "", at: 1, answers: {} };
  let since = null;

  /* What was answered; kept by the browser where it keeps anything for files. */
  function restored() {
    try {
      const kept = JSON.parse(localStorage.getItem(slot));
      return kept && typeof kept.listener === "string" && kept.answers && kept.at >= 1 && kept.at <= config.trials ? kept : null;
    } catch (error) {
      return null;
    }
  }

  function keep() {
    try {
      localStorage.setItem(slot, JSON.stringify(state));
    } catch (error) { /* a browser that keeps nothing: the file at the end is what counts */ }
  }

  function answerTo(number) {
    if (!state.answers[number]) {
      state.answers[number] = { choice: "", confidence: "", seconds: 0, plays: { x: 0, a: 0, b: 0 }, comment: "" };
    }
    return state.answers[number];
  }

  const isDone = (number) => Boolean(state.answers[number] && state.answers[number].choice && state.answers[number].confidence);
  const numbers = () => Array.from({ length: config.trials }, (_, i) => i + 1);

  /* Seconds count while a trial is shown and the page is in view. */
  function stopClock() {
    if (since !== null) answerTo(state.at).seconds += (performance.now() - since) / 1000;
    since = null;
  }

  function startClock() {
    if (since === null && !byId("trial").hidden && !document.hidden) since = performance.now();
  }

  /* Clips */
  const players = letters.map((letter) => {
    const box = document.querySelector(`.clip[data-letter="${letter}"]`);
    const player = { letter, box, audio: new Audio(), url: "" };
    player.button = box.querySelector(".play");
    player.position = box.querySelector("input");
    player.audio.preload = "auto";
    player.button.addEventListener("click", () => toggle(player));
    player.position.addEventListener("input", () => {
      if (player.audio.duration) player.audio.currentTime = (player.audio.duration * player.position.value) / 1000;
    });
    ["timeupdate", "play", "pause", "ended", "loadedmetadata"].forEach((name) => {
      player.audio.addEventListener(name, () => showPlayer(player));
    });
    player.audio.addEventListener("error", () => {
      if (player.url) complain("This browser cannot play clip " + letter.toUpperCase() + ": please use another browser.");
    });
    return player;
  });

  function bytesOf(number, letter) {
    const text = atob(byId("clip-" + number + "-" + letter).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  function load(player, number) {
    unload(player);
    player.url = URL.createObjectURL(new Blob([bytesOf(number, player.letter)], { type: config.mime }));
    player.audio.src = player.url;
    showPlayer(player);
  }

  function unload(player) {
    player.audio.pause();
    if (player.url) URL.revokeObjectURL(player.url);
    player.url = "";
    player.audio.removeAttribute("src");
  }

  function toggle(player) {
    if (!player.audio.paused) {
      player.audio.pause();
      return;
    }
    players.forEach((other) => other !== player && other.audio.pause());
    answerTo(state.at).plays[player.letter] += 1;
    keep();
    const started = player.audio.play();
    if (started) started.catch(() => {}); // its error event says why
    showPlayer(player);
  }

  function clock(seconds) {
    const whole = Math.floor(seconds || 0);
    return Math.floor(whole / 60) + ":" + String(whole % 60).padStart(2, "0");
  }

  function showPlayer(player) {
    const audio = player.audio;
    const playing = !audio.paused && !audio.ended;
    const name = player.letter.toUpperCase();
    player.box.classList.toggle("playing", playing);
    player.box.classList.toggle("heard", answerTo(state.at).plays[player.letter] > 0);
    player.box.querySelector(".state").textContent = playing ? "Pause" : "Play";
    player.button.setAttribute("aria-label", (playing ? "Pause " : "Play ") + name);
    player.position.value = audio.duration ? Math.round((1000 * audio.currentTime) / audio.duration) : 0;
    player.position.setAttribute("aria-valuetext", clock(audio.currentTime) + " of " + clock(audio.duration));
    player.box.querySelector(".time").textContent = clock(audio.ended || !audio.currentTime ? audio.duration : audio.currentTime);
  }

  /* Screens */
  function show(id) {
    stopClock();
    ["start", "trial", "end"].forEach((name) => { byId(name).hidden = name !== id; });
    if (id !== "trial") players.forEach(unload);
    byId(id + "-title").focus();
    window.scrollTo(0, 0);
    startClock();
    keep();
  }

  function showTrial(number) {
    stopClock();
    state.at = number;
    const answer = answerTo(number);
    byId("at").textContent = number;
    all("input[name=choice]").forEach((input) => { input.checked = input.value === answer.choice; });
    all("input[name=confidence]").forEach((input) => { input.checked = input.value === answer.confidence; });
    byId("comment").value = answer.comment;
    byId("next").textContent = number === config.trials ? "Finish" : "Next";
    complain("");
    showProgress();
    players.forEach((player) => load(player, number));
    show("trial");
  }

  function showProgress() {
    byId("progress").value = numbers().filter(isDone).length;
  }

  function showEnd() {
    const missing = numbers().filter((number) => !isDone(number));
    byId("summary").textContent = `${config.trials - missing.length} of ${config.trials} trials are answered.` +
      (missing.length ? " Not answered yet:" : " Thank you. Please save the file and hand it to whoever gave you this page.");
    byId("missing").replaceChildren(...missing.map((number) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "Trial " + number;
      button.addEventListener("click", () => showTrial(number));
      item.append(button);
      return item;
    }));
    byId("saved").textContent = "";
    byId("save").disabled = missing.length === config.trials;
    show("end");
  }

  function complain(text) {
    byId("problem").textContent = text;
  }

  /* Answering */
  function take() {
    const answer = answerTo(state.at);
    const checked = (name) => (document.querySelector(`input[name=${name}]:checked`) || { value: "" }).value;
    answer.choice = checked("choice");
    answer.confidence = checked("confidence");
    answer.comment = byId("comment").value;
    showProgress();
    keep();
  }

  function problem() {
    const answer = answerTo(state.at);
    const unheard = letters.filter((letter) => !answer.plays[letter]).map((letter) => letter.toUpperCase());
    if (unheard.length) return "Please listen to " + unheard.join(" and ") + " first.";
    if (!answer.choice) return "Please choose A, B or neither.";
    if (!answer.confidence) return "Please say how sure you are.";
    return "";
  }

  function next() {
    take();
    const text = problem();
    complain(text);
    if (text) return;
    if (state.at === config.trials) showEnd();
    else showTrial(state.at + 1);
  }

  function back() {
    take();
    if (state.at > 1) showTrial(state.at - 1);
    else showStart();
  }

  /* Saving */
  const cell = (value) => '"' + String(value).replace(/"/g, '""') + '"';

  function csv() {
    const names = ["listener", "test", "trial", "choice", "confidence", "seconds", "plays_x", "plays_a", "plays_b", "comment"];
    const lines = numbers().filter(isDone).map((number) => {
      const answer = state.answers[number];
      return [state.listener, config.test, number, answer.choice, answer.confidence, answer.seconds.toFixed(1),
        answer.plays.x, answer.plays.a, answer.plays.b, answer.comment].map(cell).join(",");
    });
    return [names.join(","), ...lines].join("\r\n") + "\r\n";
  }

  function save() {
    const link = document.createElement("a");
    const file = "listening-" + config.test.slice(0, 8) + "-" + state.listener.replace(/[^A-Za-z0-9_-]+/g, "_") + ".csv";
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    byId("saved").textContent = "Saved as " + file + " where your browser puts downloads.";
  }

  /* Beginning */
  function randomName() {
    const part = crypto.getRandomValues(new Uint32Array(1))[0];
    return "listener-" + part.toString(16).padStart(8, "0");
  }

  function showStart() {
    const begun = numbers().some(isDone);
    byId("listener").value = state.listener;
    byId("begin-button").textContent = begun ? "Carry on" : "Begin";
    byId("reset").hidden = !begun;
    show("start");
  }

  byId("begin").addEventListener("submit", (event) => {
    event.preventDefault();
    state.listener = byId("listener").value.replace(/[\u0000-\u001f\u007f]+/g, " ").trim() || state.listener || randomName();
    showTrial(state.at);
  });
  byId("reset").addEventListener("click", () => {
    if (!window.confirm("Delete the answers that this browser keeps?")) return;
    state = { listener: "", at: 1, answers: {} };
    showStart();
  });
  byId("answer").addEventListener("submit", (event) => {
    event.preventDefault();
    next();
  });
  byId("answer").addEventListener("input", take);
  byId("back").addEventListener("click", back);
  byId("last").addEventListener("click", () => showTrial(state.at));
  byId("save").addEventListener("click", save);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stopClock();
    else startClock();
    keep();
  });
  window.addEventListener("pagehide", () => {
    stopClock();
    keep();
  });

  function pick(name, value) {
    document.querySelector(`input[name=${name}][value=${value}]`).checked = true;
    take();
  }

  const keys = {
    x: () => toggle(players[0]), a: () => toggle(players[1]), b: () => toggle(players[2]),
    1: () => pick("choice", "A"), 2: () => pick("choice", "B"), 3: () => pick("choice", "neither"),
    s: () => pick("confidence", "sure"), u: () => pick("confidence", "unsure"), n: next, p: back,
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("textarea, input[type=text]");
    const action = keys[event.key.toLowerCase()];
    if (byId("trial").hidden || typing || !byId("letters").checked || !action) return;
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    event.preventDefault();
    action();
  });

  all(".count").forEach((element) => { element.textContent = config.trials; });
  byId("progress").max = config.trials;
  byId("test-id").textContent = config.test;
  showStart();
})();
