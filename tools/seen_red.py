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
LOSSES, AUGS, LAYERS, BT, MIXED, EVAL, CLASS, DIAG, DOCTOR, REPORTS, DATA, TRAIN, CKPT, DIST = (f"self_supervised_bt/{n}.py" for n in (
    "losses", "augmentations", "layers", "barlow_twins", "mixed", "evaluation", "classifiers", "diagnostics", "doctor", "reports", "data", "training",
    "checkpoints", "distributed"))

BREAKS = [  # what is broken, where, the line as it is, the line broken, the tests that should go red
    ("order: after the types are cast", BT, "CastToTensor.order-1,True", "CastToTensor.order+.5,True", "typed_batches"),
    ("order: a plain tensor stays plain", AUGS, "return _floats(x).as_subclass(kind)", "return _floats(x)", "plain_tensor"),
    ("unlabelled: no stand-in target", BT, "if not len(self.yb):", "if False:", "weights_move"),
    ("give back: not after an exception", BT, "        give_back(self)\n        for cb", "        for cb", "comes_back"),
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
    ("metrics: see doubled rows", BT, "self.learn.pred = self.pred[:len(self.pred)//len(self.augs)]", "pass", "training_metrics"),
    ("encoder: forgets its normalisation", BT, "check_model(learn.model).encoder.clean_pipeline = cbs[0].clean", "check_model(learn.model)",
     "remembers_its_normalisation"),
    ("encoder: loses its normalisation on disk", CKPT, "encoder.clean_pipeline = restore_input(about[\"input\"])", "pass", "comes_back_with_its_input"),
    ("probe: in train mode", LAYERS, "            model.eval()\n", "            model.train()\n", "no_trace"),
    ("probe: modes not restored", LAYERS, "for m,mode in modes: m.training = mode", "model.train()", "no_trace"),
    ("probe: one fixed size", LAYERS, "return [(s, s) if isinstance(s, int) else tuple(s) for s in declared+common if s]", "return [(128, 128)]",
     "builds_projects and vit"),
    ("loss: the blocks forget their place", LOSSES, ".addcmul_(b, w[i:j]) if need", ".addcmul_(b, w[:j-i]) if need",
     "equal_the_textbook"),
    ("loss: a strip of the symmetric product is not copied", LOSSES, "_strips(len(k), k.device)[1:]", "_strips(len(k), k.device)[2:]", "both_forms_agree"),
    ("loss: autocast stays on", LOSSES, "enabled=False", "enabled=True", "autocast"),
    ("loss: unbiased variance", LOSSES, "return F.batch_norm(z, None, None, training=True, eps=eps)", "return (z - z.mean(0))/(z.var(0) + eps).sqrt()", "textbook"),
    ("loss: no eps", LOSSES, "eps=eps)", "eps=1e-30)", "constant_dimensions"),
    ("loss: views normalised jointly", LOSSES, "return _cross(_normalise(z1, eps), _normalise(z2, eps))",
     "return _cross(*_normalise(torch.cat([z1, z2]), eps).chunk(2))", "normalised_apart"),
    ("loss: a diagonal too many", LOSSES, "view(d-1, d+1)[:, :-1]", "view(d-1, d+1)", "variants_equal"),
    ("loss: autocast stays on in the backward pass", LOSSES, "grads[0].device.type, enabled=False", "grads[0].device.type, enabled=True", "autocast"),
    ("loss: Gram gradient takes the wrong matrix", LOSSES, "in ((kb, a, b, r1,", "in ((ka, a, b, r1,", "textbook"),
    ("loss: mixed Gram gradient takes the wrong matrix", LOSSES, "(b*w).addmm_(through(kb), a)", "(b*w).addmm_(through(ka), a)", "formula"),
    ("loss: the gradient forgets the mean", LOSSES, "g.sub_(g.mean(0)).addcmul_", "g.addcmul_", "constant_dimensions or textbook"),
    ("loss: the diagonal stays among the squares", LOSSES, " - diag.square().sum()).clamp", ").clamp", "both_forms_agree"),
    ("loss: half of a Gram matrix missing", LOSSES, "k[:i,i:j] = k[i:j,:i].T", "k[:i,i:j] = 0", "textbook"),
    ("loss: one long float32 sum", LOSSES, "torch.linalg.vector_norm(c, dim=1).square().sum()", "torch.linalg.vector_norm(c).square()", "large_matrix"),
    ("loss: redundancy below 0", LOSSES, ").clamp(min=0)", ")", "never_negative"),
    ("loss: never the cheaper form", LOSSES, 'return "gram" if 10*n <', 'return "direct" if 10*n <', "cheaper_form"),
    ("loss: second derivatives silently wrong", LOSSES, "staticmethod(once_differentiable(wrapped))", "staticmethod(wrapped)", "second_derivative"),
    ("loss: nan passes", LOSSES, "check_loss(loss, dict(z1=z1, z2=z2), self.check_finite)", "pass", "nan_names_the_view"),
    ("loss: a GPU is waited for", LOSSES, 'check_finite = loss.device.type == "cpu"', "check_finite = True", "on_an_accelerator"),
    ("loss: gradient through the stopped branch", LOSSES, "z2.detach() if self.stop_gradient else z2", "z2", "stop_gradient"),
    ("loss: the queue keeps the oldest", LOSSES, "torch.cat([z, past.to(z)])", "torch.cat([past.to(z), z])", "queue_joins"),
    ("mixed: weights the wrong way round", MIXED, "torch.lerp(v2[perm], v1,", "torch.lerp(v1, v2[perm],", "test_mixing"),
    ("mixed: an image mixed with itself", MIXED, "torch.lerp(v2[perm], v1,", "torch.lerp(v2, v1,", "equal_the_formula"),
    ("mixed: no gradient for the mixture", LOSSES, "(ka + kb).mul_(t) @ e if need_e else None", "None", "equal_the_formula"),
    ("mixed: the script's target in the paper's place", MIXED, 'if self.target == "paper"', 'if self.target != "paper"', "equal_the_formula"),
    ("mixed: one permutation for all batches", MIXED, "torch.randperm(len(v1), device=v1.device)", "torch.arange(len(v1), device=v1.device)",
     "loss_is_that_of_the_mixture"),
    ("terms: training batches not counted", BT, "if self.by_callback and learn.training: self.add(learn)", "pass", "terms_are_means"),
    ("terms: left among the metrics", BT, "if not isinstance(m, Column)", "if True", "terms_are_means"),
    ("nan: reaches the weights", BT, "if at_once(loss): return check_loss(loss, {f\"z{i}\": z for i,z in enumerate(zs, 1)}, True)", "return", "nan_is_named"),
    ("nan: never noticed on an accelerator", BT, "def after_train(self): self.look_back()", "def after_train(self): pass", "noticed_later"),
    ("search: dies of a nan", BT, "if self.cb.learn._grab_cbs(LRFinder)", "if False", "search_that_goes_too_far"),
    ("predictor: on both branches", BT, "return torch.cat([self.predictor(z1), z2])", "return self.predictor(z)", "predictor_works"),
    ("views: one draw for the whole batch", AUGS, "same_on_batch:bool=False", "same_on_batch:bool=True", "draws_for_itself"),
    ("views: crops of another size", AUGS, "K.RandomResizedCrop(self.size, self.scale, self.ratio,", "K.RandomResizedCrop(self.size, (.2, 1.), self.ratio,", "follow_their_ranges"),
    ("views: pipelines that draw once for their batch", AUGS, "**kwargs}), split_idx=0)", "**kwargs, 'same_on_batch': True}), split_idx=0)", "independent_draws"),
    ("views: the second view of a recipe like the first", AUGS, "views[i % len(views)]", "views[0]", "recipes_are"),
    ("views: areas not uniform", AUGS, "+ scale[0])*(h*w)", "+ scale[0])**1.2*(h*w)", "crop_boxes_are"),
    ("views: ratios not log-uniform", AUGS, "aspect = np.exp(", "aspect = 1 + (", "crop_boxes_are"),
    ("views: places never at the far edge", AUGS, "(h - ch + 1))", "(h - ch))", "crop_boxes_are"),
    ("views: no fallback for a crop that never fits", AUGS, "if not fits[first].all():", "if False:", "never_fits"),
    ("views: jitter in one order", AUGS, "order=torch.rand(n, 4).argsort(1)", "order=torch.arange(4).expand(n, 4)", "factors_and_orders"),
    ("views: hue the other way round", AUGS, "a = 2*math.pi*h[", "a = -2*math.pi*h[", "stays_near"),
    ("views: contrast forgets what came before", AUGS, "mean[:,1],own[:,2]", "mean[:,2],own[:,2]", "where_nothing_is_cut_off"),
    ("views: one blur for all", AUGS, "return dict(sigma=_uniform(n, *self.sigma))", "return dict(sigma=_uniform(1, *self.sigma).expand(n))", "draws_for_itself"),
    ("views: the blur's edge is black", AUGS, 'else (0,0,r,r), mode="reflect")', "else (0,0,r,r))", "pixel_by_pixel"),
    ("views: a large crop is never flipped", AUGS, "v[i] = one.flip(-1) if flip else one", "v[i] = one", "pixel_by_pixel"),
    ("views: shrinking without antialiasing", AUGS, "/(length/n_out).clamp(min=1)).abs_()", ").abs_()", "pixel_by_pixel"),
    ("views: a step for the wrong images", AUGS, "these = (at[lo:hi] - i)", "these = (at[lo:hi]*0 + torch.arange(hi - lo))", "pixel_by_pixel"),
    ("views: probability ignored", AUGS, "torch.rand(m) < step.p}", "torch.rand(m) < .5}", "as_often"),
    ("views: same_on_batch ignored", AUGS, "m = 1 if self.same_on_batch else n", "m = n", "draws_for_itself"),
    ("views: a plain tensor is skipped", AUGS, "def encodes(self, x:Tensor):", "def encodes(self, x:TensorImage):", "test_views_of_plain"),
    ("views: pixels are not looked at", AUGS, "if not self.checked: check_pixels(", "if False: check_pixels(", "outside_their_range"),
    ("three views: one pair alone", LOSSES, "for i,j in combinations(range(len(zs)), 2):", "for i,j in [(0, 1)]:", "mean_over_pairs"),
    ("three views: predictions for all of them", BT, "self.pred[:len(self.pred)//len(self.augs)]", "self.pred[:len(self.pred)//2]", "three_views_predict"),
    ("devices: statistics stay where they were made", AUGS, "s.to(device=x.device, dtype=x.dtype)", "s", "follow_the_batch"),
    ("one channel: three by broadcasting", AUGS, "if x.shape[1] == 1: return mean.mean(1, keepdim=True),std.mean(1, keepdim=True)", "pass",
     "normalisation_and_back or odd_sizes"),
    ("one channel: jitter steps aside", AUGS, "if x.shape[1] == 1: return self.aug(x.expand(-1,3,-1,-1))[:, :1]", "if x.shape[1] == 1: return x",
     "jittered_like_grey"),
    ("batch of one: trained on", BT, "if bs == 1 or (n % bs == 1 and not dl.drop_last):", "if False:", "refused_before_anything"),
    ("batch of one: kills validation", BT, "        raise CancelBatchException()\n", "        raise ValueError()\n", "left_out_and_said"),
    ("encode: shuffled", EVAL, "data.new(shuffle=False, drop_last=False)", "data", "keeps_order"),
    ("knn: unweighted", EVAL, "/temperature).exp()", "*0).exp()", "equal_a_loop"),
    ("knn: a query counts itself", EVAL, "s.diagonal(i-j).fill_(-torch.inf)", "s.diagonal(i).fill_(-torch.inf)", "several_tiles"),
    ("knn: the nearest left out instead of itself", EVAL, "m = len(self.bank) - self.alone", "m = len(self.bank)", "bad_input"),
    ("knn: bank not normalised", EVAL, ".mul_(self.scale[j:j+self.wide])", "", "full_matrix or equal_a_loop"),
    ("knn: only the last block counts", EVAL, "            if best is not None:\n", "            if False:\n", "several_tiles"),
    ("probe: C chosen on the rows it is fitted to", EVAL, "(fit_h,fit_y),(val_h,val_y),tried,w = (h[keep], y[keep])", "(fit_h,fit_y),(val_h,val_y),tried,w = (h, y)",
     "linear_probe_equals"),
    ("probe: the bias is regularised", EVAL, "w[:,:-1].square().sum()/(2*C*len(h))", "w.square().sum()/(2*C*len(h))", "logistic_regression_reaches"),
    ("probe: another C than scikit-learn's", EVAL, "/(2*C*len(h))", "/(C*len(h))", "logistic_regression_reaches"),
    ("probe: standardisation not folded in", EVAL, "w[:,-1] - classifier.weight @ mean", "w[:,-1]", "linear_probe_equals"),
    ("online: draws random numbers", EVAL, "nn.utils.skip_init(nn.Linear, ", "nn.Linear(", "leaves_training"),
    ("online: an error ends training", EVAL, "except Exception as e:   # training goes on", "except ZeroDivisionError as e:   # training goes on", "costs_no_training"),
    ("rank: singular values squared", EVAL, "p = s/s.sum() + 1e-7", "p = s**2/(s**2).sum() + 1e-7", "equals_its_formula"),
    ("shares of labels: of all, not of every class", EVAL, "max(1, round(n*len(r)))", "max(1, round(n*len(y)/len(rows)))", "shares_of_labels"),
    ("classifier: not normalised", CLASS, "self.head(self.encoder(self.norm(image_batch(x)).as_subclass(Tensor)))", "self.head(self.encoder(x.as_subclass(Tensor)))",
     "normalised_once"),
    ("classifier: the pretrained encoder itself", CLASS, "Classifier(deepcopy(encoder).requires_grad_(True)", "Classifier(encoder.requires_grad_(True)", "encoder_is_copied"),
    ("classifier: a frozen encoder in train mode", CLASS, "self.encoder.eval()", "pass", "freezing_trains"),
    ("protocol: a cosine by step", CLASS, "min(math.floor(pct*epochs + 1e-6), epochs-1)/epochs", "pct", "equals_pytorch or once_an_epoch"),
    ("protocol: no weight decay on biases", CLASS, "wd_bn_bias=True", "wd_bn_bias=False", "equals_pytorch"),
    ("subset: of the whole set", CLASS, "get_idxs=order, ", "", "subset_is_the_subset"),
    ("diagnostics: a step waits", DIAG, "self.std = self.zs[0].float().std(0, correction=0)", "self.std = self.zs[0].float().std(0, correction=0); self.std.sum().item()", "no_step_waits"),
    ("diagnostics: one view's std for another thing", DIAG, "self.std.median()", "self.std.mean()", "columns_are_the_means"),
    ("diagnostics: the last batch alone", DIAG, "zip(names, numbers.mean(0).tolist())", "zip(names, numbers[-1].tolist())", "columns_are_the_means"),
    ("diagnostics: a corner of a wide matrix", DIAG, "torch.linspace(0, d-1, min(size, d)).round().long()", "torch.arange(min(size, d))", "keeps_its_diagonal"),
    ("diagnostics: pictures go nowhere", DIAG, "cb.writer.add_figure(name, figure, step, close=False)", "pass", "reach_tensorboard"),
    ("doctor: trains the model itself", DOCTOR, "deepcopy(check_model(learn.model)).train()", "check_model(learn.model).train()", "nothing_is_changed"),
    ("doctor: random state moves on", DOCTOR, "random.setstate(states[0])", "pass", "nothing_is_changed or goes_on"),
    ("doctor: one draw for all passes", DOCTOR, "seen.alike = _drawn_alike(seen)", "pass", "every_finding_is_provoked"),
    ("doctor: strangers among twins", DOCTOR, "own,others = d.diagonal()[:,None]", "own,others = d[:,:1]", "thumbnails"),
    ("report: a failing part takes the page along", REPORTS, "except Exception as e: return Figure(", "except ZeroDivisionError as e: return Figure(", "costs_the_others"),
    ("autocast: stays on after an exception", TRAIN, ", always_call=True", "", "after_an_exception"),
    ("autocast: stays with the model", BT, "if hasattr(type(cb), \"let_go\"): cb.let_go()", "pass", "nothing_of_it_stays"),
    ("distributed: gradients too small by the number of processes, gathered", DIST, "((g*world).to(t) if", "(g.to(t) if", "every_gradient"),
    ("distributed: gradients too small by the number of processes, summed", DIST, "(x*ctx.world).to(t)", "x.to(t)", "every_gradient"),
    ("distributed: gradients too small by the number of processes, any loss", DIST, "g[ctx.own]*ctx.world", "g[ctx.own]", "every_gradient"),
    ("distributed: uneven rows in the wrong place", DIST, "start = sum(sizes[:_rank(group)])", "start = sizes[0]*_rank(group)", "every_gradient"),
    ("distributed: moments of parts unweighted", DIST, "whole = (parts[:,0]*n).sum(0)/n.sum()", "whole = parts[:,0].mean(0)", "every_gradient"),
    ("distributed: nothing summed through the standardising", DIST, "vecdot(gb, b[own], dim=0)]), ctx.group)/n", "vecdot(gb, b[own], dim=0)]), None)*0", "every_gradient"),
    ("distributed: own permutation among strangers", DIST, "_gather(perm + start,", "_gather(perm,", "every_gradient"),
    ("distributed: BatchNorm's gradient by own rows", DIST, "means = _add_up(own.clone(), ctx.group)/ctx.n", "means = own/g[:,0].numel()", "every_gradient"),
    ("distributed: BatchNorm without its activation", DIST, 'return m.act(m.drop(x)) if hasattr(m, "act") else x', "return x", "every_gradient"),
    ("distributed: the loss of a part", DIST, "    self.objective = objective\n    if synced", "    if synced", "equals_that_of_one_process"),
    ("distributed: objective not given back", DIST, "self.objective,trainer,synced,cb,kept = self.joined", "_,trainer,synced,cb,kept = self.joined", "equals_that_of_one_process"),
    ("distributed: one draw for all processes", DIST, "        separate_draws()\n", "", "50_steps"),
    ("distributed: two processes draw alike", DIST, "seed = int(on) + _rank(group)", "seed = int(on)", "draws_differ"),
    ("distributed: each process keeps its own running moments", DIST, "for b in self.model.buffers(): dist.broadcast(b, 0)", "pass", "50_steps"),
    ("distributed: a search that waits for ever", DIST, "    if kept:   #", "    if False:   #", "search_for_the"),
    ("distributed: the dearer exchange", DIST, 'return "gather" if n*itemsize <', 'return "sum" if n*itemsize <', "cheaper_exchange_is"),
    ("distributed: half precision sent in full", DIST, "_at_least_float32(_gather(torch.cat([z1, z2], 1), sizes, group))", "_gather(_at_least_float32(torch.cat([z1, z2], 1)), sizes, group)",
     "bytes_exchanged"),
    ("distributed: a lost process unexplained", DIST, "if not known and not (", "if True or not (", "takes_the_others"),
    ("distributed: a loss of parts without the module", BT, 'get_world_size() > 1 and self.exchange != "none"', "get_world_size() > 99", "torchrun"),
    ("distributed: a length that is not the number of batches", DIST, "return own//bs if self.drop_last", "return length(self) if self.drop_last", "shared_out"),
    ("data: divided by 255 twice", DATA, "[IntToFloatTensor()]*(data.x.dtype == torch.uint8)", "[IntToFloatTensor()]", "unit_range"),
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
