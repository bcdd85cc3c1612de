"""The folder copied into another project under another name: its README's snippets run there, beside the original."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "kernels"
CHECKS = """
import kernels.fused, borrowed.fused  # the ops of two copies do not collide
want = torch.log_softmax({logits}, -1).gather(-1, {ids}[..., None])[..., 0]
assert torch.allclose({logp}, want, atol=1e-5)
"""
ENDINGS = [
    "assert hidden.grad[mask & (adv != 0)].ne(0).any(1).all() and hidden.grad[5].eq(0).all() and stats[0] == len(rows)",
    "assert loss.isfinite() and stats[0] == 12 and student.grad.isfinite().all() and student.grad.ne(0).any()",
    CHECKS.format(logits="logits", ids="index", logp="selective_log_softmax(logits, index)"),
    CHECKS.format(logits="logits", ids="labels", logp="logp"),
]


def test_snippets_run_under_another_name(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "borrowed", ignore=shutil.ignore_patterns("__pycache__"))
    snippets = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    snippets = [snippet for snippet in snippets if "import GRPOTrainer" not in snippet]  # test_drop_in_trl.py runs it
    script = []
    for snippet, ending in zip(snippets, ENDINGS, strict=True):
        script += [snippet.replace("from kernels", "from borrowed"), ending]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{KERNELS.parent}"}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "'tokens': 8.0" in result.stdout


def test_all_imports_are_relative():
    own = {path.stem for path in KERNELS.glob("*.py")}
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                assert node.level == 1 and own.issuperset(names), f"{path.name}: from {'.' * node.level} import {names}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {name.split(".")[0] for name in names}
                assert roots <= {"torch", "triton"} | sys.stdlib_module_names, f"{path.name} imports {names}"
