"""Dense grounding: each cell of the masks belongs to the patch that covers it."""

import pytest
import torch

from vla_oft.heads import grounding


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_a_patch_answers_for_its_own_cells(cells):
    head = grounding.Head(grounding.Config(cells=cells), width=8)
    patches = torch.zeros(1, 2 * 9, 8)  # two cameras, 3 x 3 patches
    changed = patches.clone()
    changed[0, 9 + 5] = torch.randn(8, generator=torch.Generator().manual_seed(0))  # second camera, row 1, column 2
    with torch.no_grad():
        difference = (head(changed, 2) - head(patches, 2)).abs() > 1e-6
    rows, columns = slice(cells, 2 * cells), slice(2 * cells, 3 * cells)
    assert difference[0, 1, :, rows, columns].all()
    difference[0, 1, :, rows, columns] = False
    assert not difference.any()


def test_the_right_patch_is_a_hit_and_images_without_the_object_do_not_count():
    head = grounding.Head(grounding.Config(), width=2)
    with torch.no_grad():
        head.norm.weight.fill_(1.0)
        head.read.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        head.read.bias.zero_()
    patches = torch.tensor([[-1.0, 1.0]]).repeat(4, 1)[None].repeat(2, 1, 1)
    patches[:, 3] = torch.tensor([1.0, -1.0])  # the last of 2 x 2 patches looks like the object
    masks = torch.zeros(2, 1, 2, 2, 2)
    masks[0, 0, 0, 1, 1] = 1
    assert float(head.mask_loss(patches, masks)[1]["grounding_hit"]) == 1.0
    masks[0, 0, 0] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(head.mask_loss(patches, masks)[1]["grounding_hit"]) == 0.0


def test_unknown_landmarks_cost_nothing():
    head = grounding.Head(grounding.Config(), width=4)
    known = torch.full((2, 2, 3), 0.1)
    unknown = known.clone()
    unknown[:, 1] = torch.nan
    hidden = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    loss, metrics = head.landmark_loss(hidden, unknown)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(metrics["landmark_error_m"])
    gradient = head.locate[-1].bias.grad
    assert gradient is not None and not gradient[3:].any() and gradient[:3].any()
