"""Near-duplicates planted among photographs: precision and recall against perceptual hashing

    python benchmarks/duplicates.py FOLDER                          # trains an encoder on some of the images first
    python benchmarks/duplicates.py FOLDER --encoder runs/photos    # a run, a file, or a name of the zoo
    python benchmarks/duplicates.py FOLDER --method simclr          # another method; --epochs 0 for random weights

Some images of the folder get a copy of each kind: saved as JPEG again, resized to 3/4 and back, cropped to 9/10 of each
side, mirrored. Found is a pair of an original and its copy in one group. Every other pair in a group counts as false,
also where the folder has duplicates of its own; "without copies" is the number of pairs that are grouped when nothing
is planted. Hashes have 64 bits; a pair is found at a Hamming distance of at most `d`, and representations at the
threshold that near_duplicates chooses for this `chance`. Seconds are those of reading, encoding or hashing.
"""
import argparse
import io
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
from _common import machine
from PIL import Image


def jpeg(im, rng):
    file = io.BytesIO()
    im.save(file, "JPEG", quality=int(rng.integers(40, 80)))
    return Image.open(file)


def resized(im, rng): return im.resize(tuple(max(1, round(.75*side)) for side in im.size), Image.BICUBIC)


def cropped(im, rng):
    w, h = (round(.9*side) for side in im.size)
    left, top = int(rng.integers(0, im.width - w + 1)), int(rng.integers(0, im.height - h + 1))
    return im.crop((left, top, left + w, top + h))


def flipped(im, rng): return im.transpose(Image.FLIP_LEFT_RIGHT)


KINDS = dict(jpeg=jpeg, resized=resized, cropped=cropped, flipped=flipped)


def plant(files, n, folder, seed):
    "Copies of `n` of the files: path of the copy -> (kind, original)"
    rng = np.random.default_rng(seed)
    copies = {}
    for i in sorted(rng.choice(len(files), n, replace=False).tolist()):
        im = Image.open(files[i]).convert("RGB")
        for kind, change in KINDS.items():
            path = folder/f"{i:06}-{kind}.png"
            change(im, rng).save(path)
            copies[str(path)] = kind, str(files[i])
    return copies


def trained(files, epochs, method):
    "An encoder trained on the files, with random weights after 0 epochs, and the seconds that it took"
    from fastai.torch_core import set_seed

    from self_supervised_bt.folders import unlabelled_dls
    from self_supervised_bt.recipes import bt_learner, get_recipe
    start = time.perf_counter()
    set_seed(0)
    recipe = get_recipe("cifar", epochs=max(1, epochs), method=method)
    learn = bt_learner(unlabelled_dls(files, 32, bs=recipe.bs, num_workers=0), recipe=recipe)
    if epochs:
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return learn, time.perf_counter() - start


def component_pairs(group):
    "Pairs of names in one group, from name -> group"
    members = {}
    for name, g in group.items(): members.setdefault(g, []).append(name)
    return {frozenset(pair) for names in members.values() for pair in combinations(names, 2)}


def hash_groups(hashes, names, distance):
    "Groups of names connected by hashes of at most this distance"
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    bits = np.array([h.hash.reshape(-1) for h in hashes], dtype=np.float32)
    ends = []
    for i in range(0, len(bits), 1024):
        part = bits[i:i + 1024]
        apart = part.sum(1)[:, None] + bits.sum(1) - 2*part @ bits.T
        a, b = np.nonzero(apart <= distance + .5)
        ends.append(np.stack([a + i, b]))
    a, b = np.concatenate(ends, 1)
    _, group = connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), shape=(len(bits),)*2), False)
    return dict(zip(names, group))


def scores(group, copies):
    "Precision over pairs, and recall per kind, per cent"
    family = {}
    for copy, (_, original) in copies.items(): family[copy] = family[original] = original
    pairs = component_pairs(group)
    right = sum(len({family.get(name, name) for name in pair}) == 1 for pair in pairs)
    recall = {kind: np.mean([group.get(copy, -1) == group.get(original, -2) for copy, (k, original) in copies.items()
                             if k == kind]) for kind in KINDS}
    return [100*right/max(1, len(pairs)), *(100*r for r in recall.values()), 100*np.mean(list(recall.values())),
            len(pairs) - right]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--encoder", help="run, file or name; trained on other images of the folder if not given")
    p.add_argument("--images", type=int, default=5000)
    p.add_argument("--copied", type=int, default=250)
    p.add_argument("--train", type=int, default=10_000)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--method", default="barlow twins")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main():
    a = arguments()
    from self_supervised_bt.data import evenly_spaced, image_files
    files = [str(f) for f in image_files(a.folder)]
    chosen = evenly_spaced(files, a.images)
    print(machine("imagehash", "scikit-learn"))
    model, about = a.encoder, a.encoder
    if not model:
        rest = sorted(set(files) - set(chosen)) or files
        model, seconds = trained(evenly_spaced(rest, a.train), a.epochs, a.method)
        about = (f"{a.method}, trained on {min(a.train, len(rest)):,} other images for {a.epochs} epochs, "
                 f"{seconds:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        copies = plant(chosen, a.copied, Path(folder), a.seed)
        print(f"{len(chosen):,} images of {Path(a.folder).name}, {a.copied} of them with {len(KINDS)} copies\n"
              f"encoder: {about}\n")
        columns = "".join(f"{kind:>9}" for kind in (*KINDS, "recall"))
        print(f"{'':26}{'precision':>10}{columns}{'false pairs':>13}{'without copies':>16}{'seconds':>9}", flush=True)
        compare_representations(model, chosen, copies)
        compare_hashes(chosen, copies)


def compare_representations(model, chosen, copies):
    "Lines of `near_duplicates`, at several chances of a false group"
    from self_supervised_bt.explore import embed, near_duplicates
    for name, how in {"embed": {}, 'embed, tta="flip"': dict(tta="flip")}.items():
        start = time.perf_counter()
        table = embed(model, [*chosen, *copies], labels=False, num_workers=0, progress=False, **how)
        seconds = time.perf_counter() - start
        for chance in (.05, .01, .005, .001, .0001):
            start = time.perf_counter()
            found = near_duplicates(table, chance=chance)
            searched = time.perf_counter() - start
            alone = near_duplicates(table.head(len(chosen)), chance=chance).groupby("group").size()
            numbers = scores(dict(zip(found.file, found.group)), copies)
            show(f"{name}, {100*chance:g} %", numbers, alone, seconds + searched)


def compare_hashes(chosen, copies):
    "Lines of perceptual hashes, at several distances"
    import imagehash
    names = [*chosen, *copies]
    for name, function in {"phash": imagehash.phash, "dhash": imagehash.dhash}.items():
        start = time.perf_counter()
        hashes = [function(Image.open(f).convert("RGB")) for f in names]
        seconds = time.perf_counter() - start
        for distance in (0, 4, 8, 10):
            group = hash_groups(hashes, names, distance)
            alone = hash_groups(hashes[:len(chosen)], chosen, distance)
            sizes = np.bincount(list(alone.values()))
            show(f"{name}, d = {distance}", scores(group, copies), sizes[sizes > 1], seconds)


def show(name, numbers, sizes, seconds):
    "A line of the table"
    *shares, false = numbers
    alone = sum(n*(n - 1)//2 for n in sizes)
    columns = "".join(f"{v:9.1f}" for v in shares[1:])
    print(f"{name:26}{shares[0]:10.1f}{columns}{false:13,}{alone:16,}{seconds:9.1f}", flush=True)


if __name__ == "__main__": sys.exit(main())
