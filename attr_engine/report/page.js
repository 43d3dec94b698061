"use strict";
(function () {
  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
  document.documentElement.classList.add("js");

  /* Players. A clip lies once in the page as a data: URI. It becomes a blob when a player that needs it comes
     near the view; far players are unloaded, because a browser keeps only so many media elements alive. */
  const urls = new Map();

  function clipUrl(number) {
    if (!urls.has(number)) {
      const uri = JSON.parse(document.getElementById("clip-" + number).textContent);
      const comma = uri.indexOf(",");
      const mime = uri.slice("data:".length, uri.indexOf(";"));
      const text = atob(uri.slice(comma + 1));
      const bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      urls.set(number, URL.createObjectURL(new Blob([bytes], { type: mime })));
    }
    return urls.get(number);
  }

  function load(audio) {
    if (!audio.hasAttribute("src")) {
      audio.preload = "metadata";
      audio.src = clipUrl(audio.dataset.clip);
    }
  }

  function unload(audio) {
    if (audio.hasAttribute("src") && audio.paused && audio.currentTime === 0) {
      audio.removeAttribute("src");
      audio.load();
    }
  }

  function showPlayhead(audio, drawing) {
    const part = audio.duration ? audio.currentTime / audio.duration : 0;
    drawing.style.setProperty("--played", 100 * part + "%");
    drawing.classList.toggle("playing", part > 0);
  }

  function startPlayers() {
    const players = all("audio[data-clip]");
    const observer = new IntersectionObserver((entries) => {
      entries.forEach((entry) => (entry.isIntersecting ? load : unload)(entry.target));
    }, { rootMargin: "400px" });
    players.forEach((audio) => {
      const drawing = audio.parentElement.querySelector(".figure");
      audio.addEventListener("timeupdate", () => showPlayhead(audio, drawing));
      audio.addEventListener("play", () => {
        players.forEach((other) => other !== audio && !other.paused && other.pause());
      });
      drawing.addEventListener("click", (event) => {
        const box = drawing.getBoundingClientRect();
        load(audio);
        if (audio.duration) audio.currentTime = audio.duration * (event.clientX - box.left) / box.width;
        audio.play();
      });
      observer.observe(audio);
    });
  }

  /* Rankings of one query become tabs. */
  function choose(tabs, chosen) {
    tabs.forEach((tab) => {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      tab.ranking.hidden = !on;
      tab.ranking.open = on;
    });
  }

  function moveFocus(tabs, event) {
    const at = tabs.indexOf(event.target);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const tab = tabs[(next + tabs.length) % tabs.length];
    choose(tabs, tab);
    tab.focus();
  }

  function makeTab(ranking, list) {
    const tab = document.createElement("button");
    const panel = ranking.querySelector(".panel");
    tab.type = "button";
    tab.id = panel.id + "-tab";
    tab.textContent = ranking.dataset.label;
    tab.ranking = ranking;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    if (ranking.dataset.control === "yes") tab.className = "is-control";
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    list.append(tab);
    return tab;
  }

  function startTabs() {
    return all(".rankings").map((rankings) => {
      const list = document.createElement("div");
      list.className = "tabs";
      list.setAttribute("role", "tablist");
      list.setAttribute("aria-label", "Ranking");
      const tabs = all(".ranking", rankings).map((ranking) => makeTab(ranking, list));
      tabs.forEach((tab) => tab.addEventListener("click", () => choose(tabs, tab)));
      list.addEventListener("keydown", (event) => moveFocus(tabs, event));
      if (tabs.length) choose(tabs, tabs[0]);
      if (tabs.length > 1) rankings.prepend(list);
      return tabs;
    });
  }

  /* One choice for all queries at once. */
  function startEverywhere(groups) {
    const labels = new Set(groups.flat().map((tab) => tab.ranking.dataset.label));
    if (groups.length < 2 || labels.size < 2) return;
    const label = document.createElement("label");
    const select = document.createElement("select");
    label.textContent = "Ranking in all queries";
    labels.forEach((text) => select.append(new Option(text, text)));
    select.addEventListener("change", () => groups.forEach((tabs) => {
      const tab = tabs.find((each) => each.ranking.dataset.label === select.value);
      if (tab) choose(tabs, tab);
    }));
    label.append(select);
    document.querySelector(".everywhere").append(label);
  }

  /* The index marks the query in view. */
  function startIndex() {
    const links = new Map(all(".index a").map((link) => [link.getAttribute("href").slice(1), link]));
    const observer = new IntersectionObserver((entries) => {
      entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(entry.target.id).setAttribute("aria-current", "true");
      });
    }, { rootMargin: "-20% 0px -75% 0px" });
    all("main > section").forEach((section) => links.has(section.id) && observer.observe(section));
  }

  startEverywhere(startTabs());
  startPlayers();
  startIndex();
})();
