// The slider over reallocations: every heat map of ranks as it was at that moment.

function startRanks(moments, views) {
  const slider = document.getElementById("moment");
  if (!slider) return;
  const said = document.getElementById("moment-said");
  const play = document.getElementById("play");
  let playing = 0;

  function show(index) {
    const moment = moments[index];
    slider.value = index;
    slider.setAttribute("aria-valuetext", moment.label);
    said.textContent = `${moment.label}: ${moment.total.toLocaleString("en")} ranks in all`;
    moment.stacks.forEach((cells, i) => {
      views[`rank-${i}`].data("cells", structuredClone(cells)).run();
    });
  }

  function stop() {
    clearInterval(playing);
    playing = 0;
    play.textContent = "Play";
  }

  function next() {
    const index = Number(slider.value) + 1;
    if (index < moments.length) show(index);
    if (index >= moments.length - 1) stop();
  }

  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  play.addEventListener("click", () => {
    if (playing) return stop();
    if (Number(slider.value) === moments.length - 1) show(0);
    play.textContent = "Stop";
    playing = setInterval(next, 700);
  });
  show(moments.length - 1);
}
