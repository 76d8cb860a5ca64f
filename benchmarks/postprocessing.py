"""What an encoder gains after training, without labels: averaged versions of an image, earlier stages, whitening

    python benchmarks/postprocessing.py digits                                    # after a short training, as bt_demo's
    python benchmarks/postprocessing.py path/to/cifar10-train --encoder encoder.safetensors
    python benchmarks/postprocessing.py path/to/cifar10-train --encoder runs/mine --size 40 --floors .001 .01 .1 1

Every row is another representation of the same images: report it beside the single view, not in its place. Whitenings
are fitted on the training images. kNN is a weighted vote of the 20 nearest (temperature 0.1); the linear probe chooses
its regularisation on a tenth of the training rows; 1-shot is mean ± standard deviation over 10 samples of one label per
class. Seconds are those of encoding all images. Of a folder, the first images per class by file name are trained on and
the last tested with; nothing is chosen here, so choose options on images that you do not report on.
"""
import argparse
import io
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

from _common import class_folders, machine

from self_supervised_bt.evaluation import encode, k_shot_accuracy, knn_accuracy, linear_probe, size_of
from self_supervised_bt.layers import fit_whitening, stage_names
from self_supervised_bt.runs import encoder_file, short_run, train_and_compare
from self_supervised_bt.weights import load_encoder

OPTIONS = {"single view": {}, "flips averaged": dict(tta="flip"), "crops averaged": dict(tta="crops"),
           "sizes averaged": dict(tta="sizes"), "flips, crops and sizes": dict(tta=("flip", "crops", "sizes")),
           "last two stages": dict(levels=2), "last three stages": dict(levels=3)}


def scores(h, y, h_test, y_test, linear=True):
    "kNN, linear and 1-shot as one text"
    one = 100*k_shot_accuracy(h, y, h_test, y_test, 1)
    knn = 100*knn_accuracy(h_test, y_test, h, y, k=20)
    probe = f"{100*linear_probe(h, y, h_test, y_test).top1:7.1f}" if linear else " "*7
    return f"{knn:6.1f} {probe} {one.mean():6.1f} ± {one.std():4.1f}"


def digits(seed):
    "A Learner after the training of `bt_demo`, and its images"
    with redirect_stdout(io.StringIO()): learn = train_and_compare(short_run("digits"), seed).learn
    sets = [dl.dataset for dl in learn.dls.loaders]
    return learn, *(t.cpu() for s in sets for t in (s.x, s.y))


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", nargs="?", default="digits", help="folder with one folder of images per class, or digits")
    p.add_argument("--encoder", help="run, file, URL or name of weights; for a folder of images")
    p.add_argument("--size", type=int, help="of the images, pixels; the encoder's if not given")
    p.add_argument("--per-class", type=int, default=1000, help="images per class to train on")
    p.add_argument("--held-out", type=int, default=500, help="images per class to test with")
    p.add_argument("--floors", type=float, nargs="+", default=[.001, .01, .1], help="of the whitening")
    p.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    p.add_argument("--no-linear", action="store_true", help="leave out the linear probe, which takes longest")
    p.add_argument("--seed", type=int, default=0, help="of the training on digits")
    a = p.parse_args()
    if a.path != "digits" and not a.encoder: p.error("--encoder is needed for a folder of images")
    return a


def main():
    a = arguments()
    warnings.filterwarnings("ignore")
    if a.path == "digits": model, x, y, x_test, y_test = digits(a.seed)
    else:
        model = load_encoder(encoder_file(a.encoder))
        x, y, x_test, y_test = class_folders(Path(a.path), a.per_class, a.held_out)
    encoder = getattr(getattr(model, "model", model), "encoder", model)
    print(machine("timm", "scikit-learn"))
    size = a.size or size_of(encoder.clean_pipeline)
    print(f"{len(x):,} images to learn from, {len(x_test):,} to test with, of {size} pixels; %\n")
    print(f"{'':24} {'floor':>7} {'width':>6} {'seconds':>8} {'kNN':>6} {'linear':>7} {'1-shot':>13}")
    for name in a.options:
        kwargs = OPTIONS[name]
        if kwargs.get("levels", 1) > max(1, len(stage_names(encoder))): continue
        start = time.perf_counter()
        h, h_test = (encode(model, images, a.size, **kwargs)[0] for images in (x, x_test))
        line = f"{h.shape[1]:6} {time.perf_counter() - start:8.1f}"
        print(f"{name:24} {'-':>7} {line} {scores(h, y, h_test, y_test, not a.no_linear)}", flush=True)
        for floor in a.floors:
            whitening = fit_whitening(h, floor)
            rows = whitening(h), y, whitening(h_test), y_test
            print(f"{'  whitened':24} {floor:7g} {line} {scores(*rows, not a.no_linear)}", flush=True)


if __name__ == "__main__": main()
