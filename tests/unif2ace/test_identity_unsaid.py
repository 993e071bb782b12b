"""Whatever holds an identity embedding does not print it."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import unif2ace
from unif2ace.data.dataset import FaceSet
from unif2ace.data.rows import MmuRow
from unif2ace.data.samples import Sample
from unif2ace.generation.reading import Faces

VECTOR = torch.tensor([[0.1234567, 0.7654321, 0.5432167]])
HOLDERS = {
    "Batch": tiny.replaced(tiny.single(tiny.mmu((2,))), identity=VECTOR),
    "EncodedFaces": dataclasses.replace(tiny.encoded_faces(1, tiny.CONFIG), identity=VECTOR),
    "FaceSet": FaceSet(*[np.zeros((1, 2))] * 3, VECTOR.numpy(), 1, {}),
    "Sample": Sample("a", "b", identity=VECTOR[0].numpy()),
    "MmuRow": MmuRow([], [], torch.zeros(1), VECTOR, torch.zeros(1)),
    "Faces": Faces(torch.zeros(1, 2), VECTOR, torch.zeros(1, 2, 2)),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_it_is_not_said(name):
    said = repr(HOLDERS[name]) + str(HOLDERS[name])
    assert not any(digits in said for digits in ("1234", "7654", "5432")) and name in said


def test_every_holder_is_here():
    """A class with a field of that name that holds numbers."""
    found = set()
    for file in Path(unif2ace.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            for field in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == "identity":
                    kind = ast.unparse(field.annotation)
                    found |= {node.name} if "Tensor" in kind or "ndarray" in kind else set()
    assert found == set(HOLDERS)
