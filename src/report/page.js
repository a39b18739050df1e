"use strict";

// Pointers are followed here, since browsers differ in where a range input lets itself be dragged;
// keys and screen readers use the input itself.
for (const frame of document.querySelectorAll(".wipe")) {
  const slider = frame.querySelector("input");
  const show = () => {
    frame.style.setProperty("--wipe", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % from the 16-bit model`);
  };
  const follow = (event) => {
    const box = frame.getBoundingClientRect();
    slider.value = String((100 * (event.clientX - box.left)) / box.width);
    show();
  };
  slider.addEventListener("input", show);
  frame.addEventListener("click", follow);
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    slider.focus({ preventScroll: true });
    // A finger that comes down may be about to scroll the page.
    if (event.pointerType === "mouse") follow(event);
  });
  frame.addEventListener("pointermove", (event) => {
    if (frame.hasPointerCapture(event.pointerId)) follow(event);
  });
  show();
}

const difference = document.querySelector("#difference");
if (difference) {
  const pictures = document.querySelector(".pictures");
  const show = () => pictures.classList.toggle("difference", difference.checked);
  difference.addEventListener("change", show);
  show();
}
