"Images as tensors, image files, and saved encoders"
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.core import imagenet_stats
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import (
    BadImage,
    digits_dls,
    digits_images,
    hold_out,
    image_files,
    jpeg_pixels,
    load_images,
    open_image,
    read_image,
    tensor_dls,
)
from self_supervised_bt.evaluation import encode
from self_supervised_bt.folders import check_images, labelled_files, size_and_channels, unlabelled_dls
from self_supervised_bt.fused import centre_resize
from self_supervised_bt.guard import item_names
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.weights import load_encoder, save_encoder


def test_digits_equal_scikit_learns():
    x, y = digits_images()
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.uint8
    assert np.abs(x[:, 0].numpy()/255 - load_digits().images/16).max() < 1/255
    assert (y.numpy() == load_digits().target).all()


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("c", [1, 3])
def test_tensor_dls_give_floats_in_the_unit_range(as_float, c):
    x = torch.randint(0, 256, (70, c, 8, 8), dtype=torch.uint8)
    dls = tensor_dls(x/255 if as_float else x, torch.arange(70), bs=16, valid_pct=.3, device="cpu")
    xb, yb = dls.one_batch()
    assert type(xb) is (TensorImageBW if c == 1 else TensorImage)
    assert torch.allclose(xb.as_subclass(torch.Tensor), x[yb].float()/255)
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train), len(dls.valid)) == (49, 21, 3, 2)
    assert torch.cat([y for _, y in dls.valid]).tolist() == dls.valid_ds.y.tolist()
    both = torch.cat([dls.train_ds.y, dls.valid_ds.y])
    assert both.sort()[0].tolist() == list(range(70))
    first, second = (torch.cat([y for _, y in dls.train]).tolist() for _ in range(2))
    assert first != second and len(set(first)) == 48


def test_identity_of_tensors_is_their_content():
    x, y = digits_images()
    first = tensor_dls(x, device="cpu").train_ds.identity()
    changed = x.clone()
    changed[tensor_dls(torch.arange(1797).view(-1, 1, 1, 1), device="cpu").train_ds.x[0]] += 1
    others = [tensor_dls(v, device="cpu").train_ds.identity() for v in (changed, x/255, x.transpose(2, 3), x[:-1])]
    assert tensor_dls(x.clone(), y, device="cpu").train_ds.identity() == first and len({first, *others}) == 5


def test_names_are_places_in_the_users_data():
    x, y = digits_images()
    ds = tensor_dls(x, y, device="cpu").valid_ds
    names = ds.names([3, 0])
    assert all(torch.equal(x[int(n.split()[1])], ds.x[i]) for n, i in zip(names, [3, 0]))
    assert item_names(ds, [3, 0]) == names


@pytest.mark.parametrize("y", [torch.arange(70) % 5 + 1, (torch.arange(70) % 5).int(), torch.arange(70) % 2 == 0])
def test_labels_of_any_whole_numbers(y):
    dls = tensor_dls(torch.rand(70, 1, 8, 8), y, bs=16, valid_pct=.3, device="cpu")
    yb = dls.one_batch()[1]
    assert yb.dtype == torch.int64 and dls.c == int(y.max()) + 1 == len(dls.vocab)
    assert torch.cat([dls.train_ds.y, dls.valid_ds.y]).bincount().tolist() == y.long().bincount().tolist()


@pytest.mark.parametrize("y, words", [(torch.arange(70) - 1, "got -1"), (torch.rand(70), "whole numbers")])
def test_labels_that_are_no_class_indices_raise(y, words):
    with pytest.raises(ValueError, match=words): tensor_dls(torch.rand(70, 1, 8, 8), y, device="cpu")


def test_digits_dls_have_images_only():
    assert len(digits_dls(device="cpu").one_batch()) == 1
    assert len(digits_dls(labels=True, device="cpu").one_batch()) == 2


def test_split_is_complete_and_reproducible():
    x, y = digits_images()
    a, b = hold_out(x, y, 300, seed=1), hold_out(x, y, 300, seed=1)
    assert all(torch.equal(i, j) for i, j in zip(a, b)) and (len(a[0]), len(a[2])) == (1497, 300)
    assert torch.equal(torch.cat([a[1], a[3]]).bincount(), y.bincount())
    assert hold_out(x, None, 300)[1] is None


def test_folder(folder):
    files = image_files(folder)
    x = load_images(files, 16, progress=False)
    assert x.shape == (40, 3, 16, 16) and x.dtype == torch.uint8
    _, y, classes = labelled_files(files)
    assert classes == ["dark", "light"] and y.bincount().tolist() == [20, 20]
    assert x[y == 0].float().mean() < 80 < 170 < x[y == 1].float().mean()        # rows and files match


# Images from files, compared with Pillow's resize and the definitions of the formats

def pixels(w=13, h=9, c=3, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (h, w, c) if c else (h, w)).astype(dtype)


def centre(a):
    m, (h, w) = min(a.shape[:2]), a.shape[:2]
    return a[(h-m)//2:(h-m)//2+m, (w-m)//2:(w-m)//2+m]


def read_whole(file, n_in=3):
    "The centred square, not resized, (size,size,n_in)"
    with Image.open(file) as im: m = min(im.size)
    return read_image(file, m, n_in).permute(1, 2, 0).numpy().astype(int)


def on_white(colour, alpha): return colour*(alpha/255.) + 255*(1 - alpha/255.)


@pytest.mark.parametrize("shape", [(40, 30, 16), (30, 40, 30), (20, 20, 33), (91, 17, 16)])
def test_resize_equals_pillows(tmp_path, shape):
    w, h, size = shape
    a = pixels(w, h)
    Image.fromarray(a).save(tmp_path/"a.png")
    expected = np.asarray(Image.fromarray(centre(a)).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    got = read_image(tmp_path/"a.png", size)
    assert got.shape == (3, size, size) and got.dtype == torch.uint8
    assert np.abs(got.permute(1, 2, 0).numpy() - expected).max() <= 1
    grey = Image.fromarray(centre(a)).convert("L").resize((size, size), Image.Resampling.BILINEAR)
    grey = np.asarray(grey).astype(int)
    assert np.abs(read_image(tmp_path/"a.png", size, 1)[0].numpy() - grey).max() <= 1


def test_a_jpeg_is_decoded_close_to_the_size_needed(tmp_path, monkeypatch):
    smooth = np.asarray(Image.fromarray(pixels(8, 6)).resize((400, 304), Image.Resampling.BICUBIC))
    Image.fromarray(smooth).save(tmp_path/"a.jpg", quality=95)
    decoded = []
    def watched(im, stored, n_in):
        decoded.append(im.size)
        return jpeg_pixels(im, stored, n_in)
    monkeypatch.setattr("self_supervised_bt.data.jpeg_pixels", watched)
    for size in (20, 37, 70, 140, 200):
        resized = Image.fromarray(centre(smooth)).resize((size, size), Image.Resampling.BILINEAR)
        expected = np.asarray(resized).astype(int)
        assert np.abs(read_image(tmp_path/"a.jpg", size).permute(1, 2, 0).numpy() - expected).mean() < 2
    assert decoded == [(50, 38), (50, 38), (100, 76), (200, 152), (400, 304)]


def jpeg(im, **kwargs):
    "An image as the bytes of a JPEG file"
    file = io.BytesIO()
    im.save(file, "jpeg", **kwargs)
    return file.getvalue()


def outcomes(content, file, size, n_in, monkeypatch):
    "What Pillow alone makes of a file, and what `read_image` does: pixels, or the reason of the error"
    file.write_bytes(content)
    def outcome():
        try: return read_image(file, size, n_in)
        except BadImage as e: return e.reason
    with monkeypatch.context() as m:
        m.setattr("self_supervised_bt.data.jpeg_pixels", lambda im, stored, n_in: None)
        pillows = outcome()
    return pillows, outcome()


def turned(how):
    exif = Image.Exif()
    exif[0x0112] = how
    return exif


JPEGS = {"4:4:4": dict(subsampling=0), "4:2:2": dict(subsampling=1), "4:2:0": dict(subsampling=2),
         "coarse": dict(quality=5), "progressive": dict(progressive=True, quality=90),
         "restarts": dict(restart_marker_blocks=3), "turned": dict(exif=turned(6)), "upright": dict(exif=turned(1))}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_pixels_of_a_jpeg_are_pillows(tmp_path, monkeypatch, kind, mode):
    seen = set()
    def watched(im, stored, n_in):
        a = jpeg_pixels(im, stored, n_in)
        seen.add(a is not None)
        return a
    monkeypatch.setattr("self_supervised_bt.data.jpeg_pixels", watched)
    for w, h, size in ((1, 1, 4), (7, 5, 5), (17, 31, 17), (64, 48, 80), (131, 97, 47), (97, 131, 30), (163, 90, 11)):
        im = Image.fromarray(pixels(w, h)).convert(mode)
        for n_in in (3, 1):
            pillows, ours = outcomes(jpeg(im, **JPEGS[kind]), tmp_path/"a.jpg", size, n_in, monkeypatch)
            assert (ours.int() - pillows.int()).abs().max() <= 1, (w, h, size, n_in)   # equal with the same libjpeg
            assert ours.is_contiguous()
    assert seen == {mode != "CMYK" and kind != "turned"}
    for w, h, size in ((3, 3, 1), (9, 7, 2), (40, 30, 7)):   # too small to tell one scale from another
        file = jpeg(Image.fromarray(pixels(w, h)).convert(mode), **JPEGS[kind])
        pillows, ours = outcomes(file, tmp_path/"a.jpg", size, 3, monkeypatch)
        assert (ours.int() - pillows.int()).abs().max() <= 1, (w, h, size)


def test_damaged_jpegs_are_judged_as_by_pillow(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    whole = [jpeg(Image.fromarray(pixels(91, 64)), quality=q, progressive=q > 60) for q in (50, 95)]
    damaged = [content[:n] for content in whole for n in (1, 20, 300, len(content)//2, -2, -1)]
    damaged += [content + b"more" for content in whole] + [content[:-40] + b"\xff\xd9" for content in whole]
    for content in whole*20:
        content = bytearray(content)
        for i in rng.integers(2, len(content), 3): content[i] = rng.integers(256)
        damaged.append(bytes(content))
    for i, content in enumerate(damaged):
        pillows, ours = outcomes(content, tmp_path/"a.jpg", (64, 15)[i % 2], 3, monkeypatch)
        assert type(ours) is type(pillows)
        assert ours == pillows if isinstance(ours, str) else (ours.int() - pillows.int()).abs().max() <= 1


def test_one_image_is_not_written_over_by_the_next(tmp_path):
    for n_in in (1, 3):
        for size in (40, 30):
            Image.fromarray(pixels(40, 40)).save(tmp_path/"a.jpg", quality=95)
            first = read_image(tmp_path/"a.jpg", size, n_in)
            kept = first.clone()
            Image.fromarray(255 - pixels(40, 40)).save(tmp_path/"a.jpg", quality=95)
            assert not torch.equal(read_image(tmp_path/"a.jpg", size, n_in), kept) and torch.equal(first, kept)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_exif_orientation(tmp_path, ending):
    blocks = np.array([[250, 5], [120, 60]], dtype=np.uint8)
    shown = np.kron(blocks, np.ones((16, 16), np.uint8))[..., None].repeat(3, 2)
    # what a viewer must undo: Exif 2.3, tag 0x0112
    stored = {1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1],
              5: shown.transpose(1, 0, 2), 6: np.rot90(shown),
              7: shown[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(shown, -1)}
    file = tmp_path/f"a.{ending}"
    quality = {"quality": 95} if ending in ("jpg", "webp") else {}
    for value, a in stored.items():
        exif = Image.Exif()
        exif[0x0112] = value
        Image.fromarray(np.ascontiguousarray(a)).save(file, exif=exif, **quality)
        assert np.abs(read_whole(file) - shown.astype(int))[4:-4:8, 4:-4:8].max() < 12, value


def test_image_with_damaged_exif_data_is_read(tmp_path):
    Image.fromarray(pixels()).save(tmp_path/"a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    Image.fromarray(pixels()).save(tmp_path/"b.jpg")
    assert torch.equal(read_image(tmp_path/"a.jpg", 8), read_image(tmp_path/"b.jpg", 8))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P bytes", "P index", "RGB key", "L key"])
def test_transparency_is_blended_onto_white(tmp_path, kind):
    colour, alpha, file = pixels(), pixels(c=0), tmp_path/"a.png"
    grey = colour[..., 0]
    if kind == "RGBA":
        Image.fromarray(np.dstack([colour, alpha])).save(file)
        expected = on_white(colour, alpha[..., None])
    elif kind == "LA":
        Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(file)
        expected = on_white(grey, alpha)[..., None].repeat(3, 2)
    elif kind.startswith("P"):
        palette, index = pixels(16, 16).reshape(256, 3), grey
        im = Image.frombytes("P", index.shape[::-1], index.tobytes())
        im.putpalette(palette.tobytes())
        opacity = np.full(256, 255)
        if kind == "P bytes": opacity[:] = np.arange(256)[::-1]
        else: opacity[index[0, 5]] = 0
        im.save(file, transparency=bytes(opacity.astype(np.uint8)) if kind == "P bytes" else int(index[0, 5]))
        expected = on_white(palette[index], opacity[index][..., None])
    elif kind == "RGB key":
        Image.fromarray(colour).save(file, transparency=tuple(int(v) for v in colour[2, 6]))
        expected = on_white(colour, np.where((colour == colour[2, 6]).all(-1), 0, 255)[..., None])
    else:
        Image.fromarray(grey).save(file, transparency=int(grey[2, 6]))
        expected = on_white(grey, np.where(grey == grey[2, 6], 0, 255))[..., None].repeat(3, 2)
    assert np.abs(read_whole(file) - centre(expected)).max() <= 1


def png(w, h, bits, colour, rows, before=(), after=()):
    "A PNG file from its definition (RFC 2083), with further chunks before and after the pixels"
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0)
    before, after = ([chunk(*o) for o in more] for more in (before, after))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    chunks = [chunk(b"IHDR", header), *before, pixels, *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_sixteen_bits(tmp_path):
    a = pixels(9, 9, c=0, dtype=np.uint16)
    a.flat[:4] = 0, 65535, 255, 256
    expected = np.round(a/257.)
    (tmp_path/"grey.png").write_bytes(png(9, 9, 16, 0, b"".join(b"\0" + r.astype(">u2").tobytes() for r in a)))
    Image.fromarray(a).save(tmp_path/"grey.tif")
    Image.frombytes("I;16B", (9, 9), a.astype(">u2").tobytes()).save(tmp_path/"big.tif")
    for name in ("grey.png", "grey.tif", "big.tif"):
        assert (read_whole(tmp_path/name, 1)[..., 0] == expected).all(), name
        assert (read_whole(tmp_path/name) == expected[..., None]).all(), name
    colour = pixels(9, 9, dtype=np.uint16)
    (tmp_path/"rgb.png").write_bytes(png(9, 9, 16, 2, b"".join(b"\0" + r.astype(">u2").tobytes() for r in colour)))
    assert (read_whole(tmp_path/"rgb.png") == colour >> 8).all()


def tiff(w, h, bits, photometric, data, more=()):
    "A TIFF file of one strip from its definition (TIFF 6.0)"
    tags = [(256, 3, w), (257, 3, h), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (277, 3, 1), (278, 3, h),
            (279, 4, len(data)), *more]
    tags = sorted([*tags, (273, 4, 8 + 2 + 12*(len(tags) + 1) + 4)])
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def grey_rows(a): return b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)


def test_white_of_more_than_eight_bits_is_that_of_the_header(tmp_path):
    v = np.array([[0, 137, 800, 3200, 4095, 11, 22, 33]]*8)
    bits = "".join(format(i, "012b") for i in v.flat)
    packed = bytes(int(bits[i:i+8], 2) for i in range(0, len(bits), 8))
    short = v.astype("<u2").tobytes()
    files = {"12.tif": tiff(8, 8, 12, 1, packed),
             "largest.tif": tiff(8, 8, 16, 1, short, [(281, 3, 4095)]),
             "about.tif": tiff(8, 8, 16, 1, short, [(281, 3, 2900)]),             # of the values used, not of white
             "a.pgm": b"P5\n8 8\n4095\n" + v.astype(">u2").tobytes(),
             "low.png": png(8, 8, 16, 0, grey_rows(v), [(b"sBIT", b"\x0c")]),
             "shift.png": png(8, 8, 16, 0, grey_rows(v << 4), [(b"sBIT", b"\x0c")]),   # as RFC 2083 demands
             "linear.png": png(8, 8, 16, 0, grey_rows(np.round(v*(65535/4095))), [(b"sBIT", b"\x0c")])}
    for name, data in files.items():
        (tmp_path/name).write_bytes(data)
        assert np.abs(read_whole(tmp_path/name, 1)[..., 0] - v*255/4095).max() <= .6, name
    dark = png(8, 8, 16, 0, grey_rows(v//16 << 4), [(b"sBIT", b"\x0c")])         # scaled, but no value is large
    (tmp_path/"dark.png").write_bytes(dark)
    assert np.abs(read_whole(tmp_path/"dark.png", 1)[..., 0] - v/257).max() <= .6


def test_16_bits_of_which_0_is_white(tmp_path):
    v = np.array([[10, 200]*4]*8)
    (tmp_path/"8.tif").write_bytes(tiff(8, 8, 8, 0, v.astype(np.uint8).tobytes()))
    (tmp_path/"16.tif").write_bytes(tiff(8, 8, 16, 0, (v*257).astype("<u2").tobytes()))
    for name in ("8.tif", "16.tif"): assert (read_whole(tmp_path/name, 1)[..., 0] == 255 - v).all(), name


def test_12_bits_in_files_of_16_that_do_not_say_so(tmp_path):
    rng = np.random.default_rng(0)
    files = [tmp_path/f"{i}.png" for i in range(9)]
    for f in files: Image.fromarray(rng.integers(0, 3000, (8, 8)).astype(np.uint16)).save(f)
    v = np.stack([np.asarray(Image.open(f)) for f in files])
    def read(**kwargs): return load_images(files, 8, 1, progress=False, **kwargs)[:, 0].numpy().astype(int)
    with pytest.warns(UserWarning, match=r"4,095 is taken \(value_range=4095\)"): x = read()
    assert np.abs(x - v*(255/4095)).max() <= .6 and len(np.unique(x)) > 100
    assert np.abs(read(value_range=65535) - v/257).max() <= .6
    assert np.abs(read(value_range=(1000, 2000)) - ((v - 1000.)*.255).clip(0, 255)).max() <= .6
    with pytest.warns(UserWarning, match="4,095 is taken"):
        dls = unlabelled_dls(files, 8, bs=9, n_in=1, valid_pct=0, num_workers=0, device="cpu")
    assert dls.train_ds.value_range == 4095 and (dls.train_ds[[3]][0][0, 0].numpy() == x[3]).all()
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(files[4])     # then all 16 bits are used
    v[4] = 20000
    with warnings.catch_warnings(action="error"): assert np.abs(read() - v/257).max() <= .6
    for wrong in ((1, 1), "12", (0, 1, 2)):
        with pytest.raises(ValueError, match="value_range must be"): read(value_range=wrong)


def test_floats_are_read_if_their_range_is_given(tmp_path):
    Image.fromarray(np.array([[-1, 0], [.5, np.nan]], np.float32)).save(tmp_path/"a.tif")
    assert read_image(tmp_path/"a.tif", 2, 1, value_range=(-1., 1.))[0].tolist() == [[0, 128], [191, 0]]
    with pytest.raises(BadImage, match="pass value_range="): read_image(tmp_path/"a.tif", 2, 1, value_range=7)


@pytest.mark.parametrize("where", ["before", "after"])
def test_long_notes_in_a_png_are_no_damage(tmp_path, where):
    long = zlib.compress(bytes(2 << 20))
    note = dict(before=(b"iCCP", b"p\0\0" + long), after=(b"zTXt", b"Comment\0\0" + long))[where]
    rows = b"".join(b"\0" + bytes([50, 60, 70]*8) for _ in range(8))
    (tmp_path/"a.png").write_bytes(png(8, 8, 8, 2, rows, **{where: [note]}))
    assert read_image(tmp_path/"a.png", 8)[:, 3, 3].tolist() == [50, 60, 70]
    assert size_and_channels([tmp_path/"a.png"]) == (8, 3)


def test_advice_for_a_large_image_works(tmp_path, monkeypatch):
    Image.new("1", (14000, 14000)).save(tmp_path/"map.png")
    with pytest.raises(BadImage, match="MAX_IMAGE_PIXELS higher"): read_image(tmp_path/"map.png", 8, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with open_image(tmp_path/"map.png") as im: assert im.size == (14000, 14000)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path/"a.png")
    with pytest.raises(BadImage, match="not a regular file"): read_image(tmp_path/"a.png", 8)


def test_a_folder_that_is_away_for_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr("self_supervised_bt.data.WAITS", (.01, .02))
    (tmp_path/"a").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path/"a/1.png")
    (tmp_path/"a").rename(tmp_path/"b")
    waited = []
    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2: (tmp_path/"b").rename(tmp_path/"a")
    monkeypatch.setattr("self_supervised_bt.data.time.sleep", wait)
    assert read_image(tmp_path/"a/1.png", 8).shape == (3, 8, 8) and waited == [.01, .02]
    (tmp_path/"a").rename(tmp_path/"b")
    for f in (lambda: read_image(tmp_path/"a/1.png", 8), lambda: check_images([tmp_path/"a/1.png"])):
        with pytest.raises(FileNotFoundError, match="the folder of .* cannot be found"): f()
    waited.clear()
    with pytest.raises(BadImage, match="cannot be opened"): read_image(tmp_path/"b/2.png", 8)   # only the file is gone
    assert waited == []


def test_a_disk_that_fails_for_a_moment(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path/"1.png")
    monkeypatch.setattr("self_supervised_bt.data.WAITS", (0., 0.))
    errors, opened = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")], Image.open
    def fails_twice(file):
        if errors: raise errors.pop()
        return opened(file)
    monkeypatch.setattr(Image, "open", fails_twice)
    assert read_image(tmp_path/"1.png", 8).shape == (3, 8, 8) and errors == []


@pytest.mark.parametrize("kind", ["black", "dark", "same"])
def test_images_without_content_are_said(tmp_path, kind):
    words = dict(black="of one colour", dark="nearly black", same="all the same")[kind]
    x = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    shown = {"black": x*0, "dark": x//16, "same": x[:1].expand(20, -1, -1, -1)}[kind]
    for i, im in enumerate(shown): Image.fromarray(im.permute(1, 2, 0).numpy()).save(tmp_path/f"{i}.png")
    for make in (lambda: tensor_dls(shown, bs=4, device="cpu"), lambda: tensor_dls(shown/255, bs=4, device="cpu"),
                 lambda: unlabelled_dls(tmp_path, 8, bs=4, num_workers=0, device="cpu")):
        with pytest.warns(UserWarning, match=words): make()
    with warnings.catch_warnings(action="error"): tensor_dls(x, bs=4, device="cpu")


def test_other_modes(tmp_path):
    a, file = pixels(9, 9), tmp_path/"a.tif"
    bits = a[..., 0] > 127
    Image.fromarray(bits).save(file)
    assert (read_whole(file) == 255*bits[..., None]).all()
    ink = pixels(9, 9, 4)
    Image.frombytes("CMYK", (9, 9), ink.tobytes()).save(file)
    assert np.abs(read_whole(file) - (255. - ink[..., :3])*(255. - ink[..., 3:])/255).max() <= 1
    ink = np.full((64, 64, 4), (200, 100, 20, 50), np.uint8)
    Image.frombytes("CMYK", (64, 64), ink.tobytes()).save(tmp_path/"a.jpg", quality=95)
    assert np.abs(read_image(tmp_path/"a.jpg", 8).permute(1, 2, 0).numpy() - np.array([44.2, 124.6, 188.9])).max() <= 3
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path/"a.gif", save_all=True, append_images=frames[1:])
    assert (read_whole(tmp_path/"a.gif") == [255, 0, 0]).all()
    for mode in ("F", "I"):
        Image.new(mode, (9, 9)).save(file)
        with pytest.raises(BadImage, match="unknown range"): read_image(file, 8)


def test_reasons(tmp_path):
    whole = {}
    for ending in ("png", "jpg", "gif", "tif", "bmp"):
        Image.fromarray(pixels(40, 50)).save(tmp_path/f"a.{ending}")
        whole[ending] = (tmp_path/f"a.{ending}").read_bytes()
    flipped = bytearray(whole["png"])
    for i in (2000, 3000): flipped[i] ^= 255
    files = {"empty.jpg": (b"", "empty file"),
             "text.jpg": (b"hello", "not an image"),
             "page.png": (b"<html>404</html>", "not an image"),
             "claims.png": (png(60000, 60000, 8, 0, b""), "too many pixels"),
             "nothing.png": (png(0, 9, 8, 2, b""), "not an image"),
             "flipped.png": (bytes(flipped), "damaged"),
             "head.jpg": (whole["jpg"][:200], "truncated"),
             **{f"cut.{k}": (v[:len(v)//2], "truncated") for k, v in whole.items()}}
    for name, (data, reason) in files.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(BadImage, match=f"{name} cannot be read as an image .{reason}") as e:
            read_image(tmp_path/name, 8)
        assert e.value.reason == reason
    (tmp_path/"link.jpg").symlink_to(tmp_path/"nowhere")
    (tmp_path/"folder.jpg").mkdir()
    for name in ("link.jpg", "folder.jpg"):
        with pytest.raises(BadImage, match="cannot be opened"): read_image(tmp_path/name, 8)
    Image.new("1", (14000, 14000)).save(tmp_path/"bomb.png")   # 25 kB on disk, 600 MB as RGB
    with pytest.raises(BadImage, match="too many pixels"): read_image(tmp_path/"bomb.png", 8)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS   # Pillow's settings are unchanged


def test_image_files_in_a_tree_of_folders(tmp_path):
    names = ["b/1.png", "b/c/d/2.JPG", "a-b/3.jpeg", "a/4.webp", "a/.5.png", ".hidden/6.png", "a/7.txt", "b.png"]
    for n in names:
        (tmp_path/"t"/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"t"/n).touch()
    (tmp_path/"t/a/up").symlink_to(tmp_path/"t")             # a link to a parent folder
    (tmp_path/"t/0").symlink_to(tmp_path/"t/b")              # a folder that is listed under its own name
    (tmp_path/"elsewhere").mkdir()
    (tmp_path/"elsewhere/8.png").touch()
    (tmp_path/"t/linked").symlink_to(tmp_path/"elsewhere")   # new
    (tmp_path/"t/9.jpg").symlink_to(tmp_path/"nowhere")      # a broken link
    (tmp_path/"t/loop").symlink_to("loop")                   # leads to itself
    found = [str(f.relative_to(tmp_path/"t")) for f in image_files(tmp_path/"t")]
    expected = ["b/1.png", "b/c/d/2.JPG", "a-b/3.jpeg", "a/4.webp", "b.png", "linked/8.png", "9.jpg"]
    assert found == sorted(expected, key=Path)


def test_folders_that_cannot_be_read_are_left_out_and_said(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path/name).mkdir()
        (tmp_path/name/"1.png").touch()
    scandir = os.scandir
    def refuses(folder):
        if folder.endswith("b"): raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.warns(UserWarning, match=r"1 folder\(s\) below .* cannot be read and are left out: .*b"):
        assert [f.parent.name for f in image_files(tmp_path)] == ["a", "c"]
    with pytest.raises(PermissionError): image_files(tmp_path/"b")


def test_pictures_of_own_runs_are_not_trained_on(tmp_path):
    runs = {"runs/a": ["run.json", "step-0000000003.pt"], "runs/b": ["run.json", "encoder.safetensors"],
            "runs/demo": ["results.json", "encoder.safetensors"], "notes": ["run.json"], "photos": ["results.json"]}
    for run, names in runs.items():
        for name in (*names, "views.png", "report/report.html", "report/loss.png"):
            (tmp_path/run/name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/run/name).touch()
    with pytest.warns(UserWarning, match=r"3 folder\(s\) below .* hold a run of this library and are left out"):
        found = {f.relative_to(tmp_path).parts[0] for f in image_files(tmp_path)}
    assert found == {"notes", "photos"}
    for run in ("runs/a", "runs/b", "runs/demo"):   # asked for, it is searched, but for what the run wrote
        with pytest.raises(ValueError, match=f"no image files below .*{run}, which is the folder of a run"):
            image_files(tmp_path/run)
        for name in ("1.png", "report.png", "sub/views.png"):
            (tmp_path/run/name).parent.mkdir(exist_ok=True)
            (tmp_path/run/name).touch()
        assert [f.name for f in image_files(tmp_path/run)] == ["1.png", "report.png", "views.png"]
    assert len(image_files(tmp_path/"notes")) == 2


def test_arrays_beside_a_run_are_images_and_its_own_array_is_none(tmp_path):
    for name in ("run.json", "trained_on.npy", "a/1.npy", "a/trained_on.npy"):   # before the first checkpoint
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    assert [str(f.relative_to(tmp_path)) for f in image_files(tmp_path)] == ["a/1.npy", "a/trained_on.npy"]
    (tmp_path/"a/1.npy").unlink()
    (tmp_path/"a/trained_on.npy").unlink()
    with pytest.raises(ValueError, match="which is the folder of a run: pass the folder of the images"):
        image_files(tmp_path)


def test_loading_uses_no_random_numbers_and_workers_change_nothing(folder, quick_end):
    files = list(image_files(folder))*30
    state = torch.get_rng_state()
    x = load_images(files, 16, progress=False, num_workers=0)
    assert torch.equal(x, load_images(files, 16, progress=False, num_workers=2))
    assert torch.equal(state, torch.get_rng_state())
    (folder/"dark/zz.jpg").write_bytes(b"no picture")
    with pytest.raises(BadImage, match="zz.jpg cannot be read"):
        load_images([*files, folder/"dark/zz.jpg"], 8, progress=False, num_workers=2)


def test_invalid_folders_and_tensors_raise(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="not a folder"): image_files(tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match=r"0 file\(s\)"): image_files(tmp_path/"empty")
    (tmp_path/"empty/notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"1 file\(s\), none with the extension of an image"):
        image_files(tmp_path/"empty")
    (folder/"dark/broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.jpg cannot be read"):
        load_images(image_files(folder), 8, progress=False)
    whole = (folder/"light/00.png").read_bytes()
    (folder/"dark/broken.jpg").unlink()
    (folder/"dark/cut.png").write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match="cut.png cannot be read"):
        load_images(image_files(folder), 8, progress=False)
    with pytest.raises(ValueError, match="size must"): load_images([], 0)
    with pytest.raises(ValueError, match="n_in must"): load_images([], 8, n_in=0)
    no_images, too_few_labels = (torch.rand(5, 8, 8),), (torch.rand(5, 1, 8, 8), torch.arange(4))
    for args, words in [(no_images, "(N,C,H,W)"), (too_few_labels, "4 labels for 5 images")]:
        with pytest.raises(ValueError) as e: tensor_dls(*args)
        assert words in str(e.value)
    with pytest.raises(ValueError, match="valid_pct"): tensor_dls(digits_images()[0], valid_pct=1.)
    with pytest.raises(ValueError, match="n_test"): hold_out(digits_images()[0], n_test=0)


# Weights

@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    augs = get_barlow_twins_aug_pipelines(16, stats=imagenet_stats)
    learn = bt_learner(digits_dls(bs=64, device="cpu"), "timm/test_resnet", small_stem=False, hidden_size=16,
                       projection_size=16, aug_pipelines=augs)
    learn.logger = print
    learn.fit(1)
    return learn


def test_saved_encoder_loads_with_its_normalisation(trained, tmp_path):
    x = digits_images()[0][:40]
    again = load_encoder(save_encoder(trained, tmp_path/"deep/er/e.safetensors"))
    assert torch.allclose(encode(again, x)[0], encode(trained, x)[0], atol=1e-5)
    assert not again.training and os.listdir(tmp_path/"deep/er") == ["e.safetensors"]
    assert load_file(tmp_path/"deep/er/e.safetensors").keys() == trained.model.encoder.state_dict().keys()
    twice = load_encoder(save_encoder(again, tmp_path/"twice"))
    assert torch.allclose(encode(twice, x)[0], encode(trained, x)[0], atol=1e-5)


def test_failed_save_keeps_the_old_file(trained, tmp_path, monkeypatch):
    file = save_encoder(trained, tmp_path/"e.safetensors")
    before = file.read_bytes()
    def fails(*args, **kwargs): raise OSError("disk full")
    monkeypatch.setattr("self_supervised_bt.weights.save_file", fails)
    with pytest.raises(OSError): save_encoder(trained, file)
    assert file.read_bytes() == before


def test_invalid_encoder_files_raise(trained, tmp_path):
    with pytest.raises(FileNotFoundError): load_encoder(tmp_path/"nothing")
    (tmp_path/"text").write_text("hello there, this is no tensor file")
    with pytest.raises(ValueError, match="is a text that begins with"): load_encoder(tmp_path/"text")
    save_file({"a": torch.ones(1)}, tmp_path/"other")
    with pytest.raises(ValueError, match="holds no ResNet .* pass it as encoder="): load_encoder(tmp_path/"other")
    own = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="encoder="): load_encoder(save_encoder(own, tmp_path/"own"))
    assert torch.equal(load_encoder(tmp_path/"own", encoder=own)[0].weight, own[0].weight)


# Sizes of two numbers

@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (50, 50), (31, 97), (3, 90)])
@pytest.mark.parametrize("size", [(24, 32), (32, 24), (24, 24), (40, 10)])
def test_a_size_of_two_numbers_takes_the_centred_part_of_that_aspect(tmp_path, shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path/"1.png")
    np.save(tmp_path/"1.npy", pixels)
    x = read_image(tmp_path/"1.png", size)
    theirs = centre_resize(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), size)[0]
    assert x.shape == (3, *size) and (x - theirs).abs().max() < 1.5   # rounded twice
    for name, same in (("1.npy", size), ("1.png", list(size))): assert torch.equal(x, read_image(tmp_path/name, same))
    assert torch.equal(x, load_images([tmp_path/"1.png"], size, progress=False)[0])
    if size[0] == size[1]: assert torch.equal(x, read_image(tmp_path/"1.png", size[0]))


def test_a_picture_on_its_side_is_turned_before_its_part_is_taken(tmp_path):
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (6, 8, 3)), np.ones((40, 40, 1)))
    picture, exif = Image.fromarray(pixels.astype(np.uint8)), Image.Exif()
    exif[0x0112] = 6   # turn by 90 degrees
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path/"turned.jpg", exif=exif, quality=95)
    picture.save(tmp_path/"plain.jpg", quality=95)
    turned, plain = (read_image(tmp_path/f"{name}.jpg", (30, 40)).float() for name in ("turned", "plain"))
    assert (turned - plain).abs().mean() < 3


@pytest.mark.parametrize("size", [(24,), (24, 32, 3), (24, 0), "24x32", (24., 32.), 0])
def test_sizes_that_cannot_be(folder, size):
    with pytest.raises(ValueError, match="size must be"): load_images(image_files(folder), size, progress=False)
