"use strict";
showTips();
offerDownloads();
document.body.dataset.ready = "1";
