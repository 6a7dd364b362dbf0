// Before anything is painted: the theme that was chosen last, so that the page does not flash.
{
  const chosen = localStorage.getItem("clover-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
}
