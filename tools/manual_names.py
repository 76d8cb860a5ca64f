"A Sphinx extension: names in backticks, as `create_encoder`, lead to their place in the API reference"
import re

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

PACKAGE = "self_supervised_bt"
NO_LINK = (nodes.reference, nodes.title, nodes.term)


def places(env):
    "Where names are described: {name: (page, anchor)}, for `create_encoder`, `zoo.get_model` and `bt_pretrain`"
    found = {}
    for full, entry in env.domains["py"].objects.items():
        if entry.objtype == "module": continue
        name = full.removeprefix(f"{PACKAGE}.")
        module, _, short = name.partition(".")
        found[name] = found[short] = (entry.docname, entry.node_id)
    labels = env.domains["std"].anonlabels
    return found | {name: place[:2] for name, place in labels.items() if name.startswith("bt_")}


def name_in(text):
    "The name that a piece of code is about: `fit(3)` -> fit, `bt_export RUN` -> bt_export; None if it is no name"
    m = re.fullmatch(r"(bt_\w+)(?: .*)?|([A-Za-z_][\w.]*)(?:\(.*\))?", text, re.S)
    return m and (m[1] or re.sub(r"^learn\.", "Learner.", m[2]))


class LinkNames(SphinxPostTransform):
    default_priority = 400
    def run(self, **kwargs):
        env = self.env
        if not hasattr(env, "_places"): env._places = places(env)
        for literal in list(self.document.findall(nodes.literal)):
            parents = []
            node = literal.parent
            while node is not None:
                parents.append(node)
                node = node.parent
            if any(isinstance(p, NO_LINK) for p in parents): continue
            place = env._places.get(name_in(literal.astext()))
            if place is None: continue
            page, anchor = place
            code = literal.deepcopy()
            literal.replace_self(make_refnode(self.app.builder, env.docname, page, anchor, [code]))


def setup(app):
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
