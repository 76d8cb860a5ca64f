"Formats out: what other tools get from an encoder, and what an export may replace"
import json
import os
import stat
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from self_supervised_bt.cli import bt_export
from self_supervised_bt.export import export_timm
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.weights import load_encoder, save_encoder

KEY = "self_supervised_bt"
CALL = dict(arch="timm/test_resnet", n_in=3, pool_type="avg", small_stem=False)
RUNS = "x=None); open('executed', 'w').write('1'); model = timm.create_model('test_resnet') #"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "The file of a small encoder"
    torch.manual_seed(0)
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    return save_encoder(encoder, tmp_path_factory.mktemp("export")/"encoder.safetensors")


def changed_file(good, path, text):
    "The same weights with other text"
    save_file(load_file(good), path, {KEY: text})
    return path


def same(a, b, size=32):
    x = torch.rand(2, 3, size, size)
    with torch.no_grad(): return torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet10t", "timm/test_resnet", "timm/test_vit"])
@pytest.mark.parametrize("small_stem", [False, True, "no pool", "keep pool"])
@pytest.mark.parametrize("pool_type", ["avg", "catavgmax"])
def test_exported_encoder_in_plain_timm_is_equal(tmp_path, arch, small_stem, pool_type):
    "With the exported code, without this library"
    if "vit" in arch and (small_stem or pool_type != "avg"): pytest.skip("a ViT has no stem, and pools its own way")
    encoder = create_encoder(arch, pretrained=False, n_in=1, pool_type=pool_type, small_stem=small_stem)
    for m in encoder.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        nn.init.uniform_(m.weight)
        nn.init.uniform_(m.bias)
        m.running_mean.uniform_(-1, 1)
    code = export_timm(encoder, tmp_path/"e.safetensors")
    assert "self_supervised_bt" not in code and (tmp_path/"e.py").read_text() == code
    scope = {}
    exec(code.replace("'e.safetensors'", repr(str(tmp_path/"e.safetensors"))), scope)
    x = torch.rand(2, 1, *([160, 160] if "vit" in arch else [48, 48]))
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](x), encoder.eval()(x), rtol=1e-4, atol=1e-5)


def test_export_raises_without_a_counterpart_in_timm(tmp_path):
    file = tmp_path/"e.safetensors"
    with pytest.raises(ValueError, match="no counterpart of xresnet18"):
        export_timm(create_encoder("xresnet18", pretrained=False), file)
    changed = create_encoder("resnet18", pretrained=False)
    changed.relu = nn.Identity()
    with pytest.raises(ValueError, match="other representations"): export_timm(changed, file)
    assert not file.exists() and not (tmp_path/"e.py").exists()


def test_export_of_a_strangers_file_runs_nothing(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed_file(good, tmp_path/"evil.safetensors", json.dumps(dict(created_by={**CALL, RUNS: 1}, input={})))
    with pytest.raises(SystemExit) as e: bt_export(run="evil.safetensors")
    assert str(e.value).startswith("bt_export: evil.safetensors does not describe") and "\n" not in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ["evil.safetensors"]


@pytest.mark.parametrize("change", [{RUNS: 1}, dict(stem_width="1\n"), dict(n_in="3"), dict(pool_type="'avg'"),
                                    dict(arch="test_resnet.');open('executed','w')#"), dict(checkpoint_path="w.pt")])
def test_code_of_an_export_holds_checked_literals_only(tmp_path, monkeypatch, change):
    "Also where the description did not come from a file, as from a run.json"
    monkeypatch.chdir(tmp_path)
    encoder = create_encoder("timm/test_resnet", pretrained=False)
    encoder.created_by.update(change)
    with pytest.raises(ValueError): export_timm(encoder, tmp_path/"e.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_size_in_a_file_takes_no_memory(good, tmp_path, monkeypatch):
    "4,096 x 4,096 pixels would make the test run of an export gigabytes large"
    changed = changed_file(good, tmp_path/"e.safetensors", json.dumps(dict(created_by=CALL, input=dict(size=[4096]*2))))
    encoder = load_encoder(changed)
    sizes = []
    encoder.conv1.register_forward_pre_hook(lambda m, x: sizes.append(x[0].shape[-1]))
    export_timm(encoder, tmp_path/"timm.safetensors")
    assert sizes and max(sizes) <= 512


def test_a_vit_that_pools_its_own_way_is_exported(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = create_encoder("timm/test_vit", pretrained=False, img_size=32)
    code = export_timm(encoder, tmp_path/"e.safetensors")
    assert "global_pool='token'" in code and "img_size=32" in code
    again = load_encoder(save_encoder(encoder, tmp_path/"own.safetensors"))
    assert same(again, encoder)


def test_an_export_onto_its_own_source_is_refused(good, tmp_path):
    file = tmp_path/"encoder.safetensors"
    file.write_bytes(good.read_bytes())
    with pytest.raises(SystemExit, match="bt_export: .*another kind of file"): bt_export(run=str(file), out=str(file))
    assert file.read_bytes() == good.read_bytes() and os.listdir(tmp_path) == ["encoder.safetensors"]


def test_an_export_replaces_no_file_of_the_user(good, tmp_path):
    encoder, code = load_encoder(good), tmp_path/"train.py"
    code.write_text("print('mine')\n")
    with pytest.raises(FileExistsError, match="train.py exists"): export_timm(encoder, tmp_path/"train.safetensors")
    for name in ("model.py", "model", "model.pt"):
        with pytest.raises(ValueError, match="must end in .safetensors"): export_timm(encoder, tmp_path/name)
    assert code.read_text() == "print('mine')\n" and os.listdir(tmp_path) == ["train.py"]


def test_an_export_replaces_an_earlier_one_but_only_by_a_complete_one(good, tmp_path):
    encoder, file = load_encoder(good), tmp_path/"e.safetensors"
    export_timm(encoder, file)
    before = file.read_bytes()
    encoder.maxpool = nn.Identity()    # no longer what create_encoder built
    with pytest.raises(ValueError, match="other representations"): export_timm(encoder, file)
    assert file.read_bytes() == before and len(os.listdir(tmp_path)) == 2
    other = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    export_timm(other, file)
    assert file.read_bytes() != before


def test_files_of_an_export_have_the_mode_of_the_umask_and_leave_nothing_beside(good, tmp_path):
    umask = os.umask(0o022)
    try: export_timm(load_encoder(good), tmp_path/"timm.safetensors")
    finally: os.umask(umask)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()}
    assert modes == {"timm.safetensors": 0o644, "timm.py": 0o644}
