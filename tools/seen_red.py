"""Can the tests fail? Breaks the library one line at a time, in a copy, and runs the tests that should notice.

    python tools/seen_red.py          # all of them, some minutes
    python tools/seen_red.py loss     # those whose name holds the word
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
LOSSES, AUGS, LAYERS, BT, EVAL, DATA, CKPT = (f"self_supervised_bt/{n}.py" for n in (
    "losses", "augmentations", "layers", "barlow_twins", "evaluation", "data", "checkpoints"))

BREAKS = [  # what is broken, where, the line as it is, the line broken, the tests that should go red
    ("order: after the types are cast", BT, "CastToTensor.order-1,True", "CastToTensor.order+.5,True", "typed_batches"),
    ("order: a plain tensor stays plain", AUGS, "return x if isinstance(x, TensorImage) else TensorImage(x)", "return x", "plain_tensor"),
    ("unlabelled: no stand-in target", BT, "if not len(self.yb):", "if False:", "weights_move"),
    ("give back: not after an exception", BT, "    finally: give_back(self)", "    finally: pass", "comes_back"),
    ("give back: not after a fit", BT, "def after_fit(self): give_back(self.learn)", "def after_fit(self): pass", "refused_with_a_reason"),
    ("no loss_func: not supplied", BT, 'a["loss_func"] = no_loss', "pass", "no_loss_func_is_needed"),
    ("predict: rows of two views", BT, "return len(self.learn._grab_cbs(GatherPredsCallback)) > 0", "return False", "one_row_an_image_in_order"),
    ("predict: not normalised", BT, "if self.predicting: self.learn.xb = (self.clean(x),)", "if self.predicting: self.learn.xb = (x,)",
     "one_row_an_image_in_order"),
    ("predict: the Learner's own activation", BT, "def activation(self, z): return z", "def activation(self, z): return z.softmax(1)", "no_softmax"),
    ("predict: decoded into labels", BT, "    def decodes(self, z):\n", "    def decodes(self, z):\n        return z\n", "refused_with_a_reason"),
    ("predict: an error that leaves fastai's lock held", BT, "def before_fit(self): self.lend()", "def before_fit(self): check_set_up(self.learn); self.lend()",
     "refused_with_a_reason"),
    ("metrics: see augmented rows", BT, "self.learn.pred = self.clean_pred()", "pass", "metrics_see_clean_rows"),
    ("metrics: see doubled rows", BT, "self.learn.pred = self.pred[:len(self.pred)//2]", "pass", "training_metrics"),
    ("encoder: forgets its normalisation", BT, "check_model(learn.model).encoder.clean_pipeline = cbs[0].clean", "check_model(learn.model)",
     "remembers_its_normalisation"),
    ("encoder: loses its normalisation on disk", CKPT, "encoder.clean_pipeline = restore_input(about[\"input\"])", "pass", "comes_back_with_its_input"),
    ("probe: in train mode", LAYERS, "            model.eval()\n", "            model.train()\n", "no_trace"),
    ("probe: modes not restored", LAYERS, "for m,mode in modes: m.training = mode", "model.train()", "no_trace"),
    ("probe: one fixed size", LAYERS, "return [(s, s) if isinstance(s, int) else tuple(s) for s in declared+common if s]", "return [(128, 128)]",
     "builds_projects and vit"),
    ("loss: autocast stays on", LOSSES, "enabled=False", "enabled=True", "autocast"),
    ("loss: unbiased variance", LOSSES, "return F.batch_norm(z, None, None, training=True, eps=eps)", "return (z - z.mean(0))/(z.var(0) + eps).sqrt()", "textbook"),
    ("loss: no eps", LOSSES, "eps=eps)", "eps=1e-30)", "constant_dimensions"),
    ("loss: views normalised jointly", LOSSES, "    z1,z2 = normalise(z1, eps),normalise(z2, eps)\n",
     "    z1,z2 = normalise(torch.cat([z1, z2]), eps).chunk(2)\n", "normalised_apart"),
    ("loss: a diagonal too many", LOSSES, "view(d-1, d+1)[:, :-1]", "view(d-1, d+1)", "textbook"),
    ("views: one draw for the whole batch", AUGS, "same_on_batch:bool=False", "same_on_batch:bool=True", "draws_for_itself"),
    ("views: crops of another size", AUGS, "K.RandomResizedCrop(size, scale, ratio,", "K.RandomResizedCrop(size, (.2, 1.), ratio,", "follow_their_ranges"),
    ("views: one pipeline twice", AUGS, "return [Pipeline(get_batch_augs(size, **kwargs), split_idx=0) for _ in range(n)]",
     "return [Pipeline(get_batch_augs(size, same_on_batch=True, **kwargs), split_idx=0)]*n", "independent_draws"),
    ("devices: statistics stay where they were made", AUGS, "s.to(device=x.device, dtype=x.dtype)", "s", "follow_the_batch"),
    ("one channel: three by broadcasting", AUGS, "if x.shape[1] == 1: return mean.mean(1, keepdim=True),std.mean(1, keepdim=True)", "pass",
     "normalisation_and_back or odd_sizes"),
    ("one channel: jitter steps aside", AUGS, "if x.shape[1] == 1: return self.aug(x.expand(-1,3,-1,-1))[:, :1]", "if x.shape[1] == 1: return x",
     "jittered_like_grey"),
    ("batch of one: trained on", BT, "if bs == 1 or (n % bs == 1 and not dl.drop_last):", "if False:", "refused_before_anything"),
    ("batch of one: kills validation", BT, "        raise CancelBatchException()\n", "        raise ValueError()\n", "left_out_and_said"),
    ("encode: shuffled", EVAL, "data.new(shuffle=False, drop_last=False)", "data", "keeps_order"),
    ("knn: unweighted", EVAL, "/temperature).exp()", "*0).exp()", "equal_a_loop"),
    ("data: divided by 255 twice", DATA, "if data.x.dtype == torch.uint8 else []", "", "unit_range"),
]


def seen_red(where, old, new, tests):
    "Do the tests fail on the broken copy, and pass on the whole one's selection?"
    with tempfile.TemporaryDirectory() as tmp:
        for name in ("self_supervised_bt", "tests"):
            shutil.copytree(root/name, Path(tmp)/name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root/"pyproject.toml", tmp)
        file = Path(tmp)/where
        text = file.read_text()
        if old not in text: return "the line is not there any more"
        file.write_text(text.replace(old, new))
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-k", tests, "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60",
                               "--ignore", "tests/test_packaging.py"],
                              cwd=tmp, env={**os.environ, "PYTHONPATH": tmp}, capture_output=True, text=True)
    return {0: "STILL GREEN", 1: "red", 5: "no such test"}.get(done.returncode, "red (hung)" if "Timeout" in done.stdout + done.stderr else f"exit {done.returncode}")


if __name__ == "__main__":
    word, bad = (sys.argv[1:] or [""])[0], 0
    for name, where, old, new, tests in BREAKS:
        if word not in name: continue
        result = seen_red(where, old, new, tests)
        bad += not result.startswith("red")
        print(f"{result:12} {name}   ({tests})", flush=True)
    sys.exit(f"{bad} not seen red" if bad else 0)
