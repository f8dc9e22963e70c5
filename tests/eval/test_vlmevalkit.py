from __future__ import annotations

import pytest

from mmfuse.errors import DataError
from mmfuse.eval.lmms import asked
from mmfuse.eval.vlmevalkit import MmfuseVLM


def test_a_message_is_answered_as_the_engine_does(engine, png, tmp_path):
    engine.model.save_pretrained(tmp_path / "model")
    engine.processor.save_pretrained(tmp_path / "model")
    picture = tmp_path / "a.png"
    picture.write_bytes(png(1))
    model = MmfuseVLM(str(tmp_path / "model"), max_new_tokens=5)
    message = [{"type": "image", "value": str(picture)}, {"type": "text", "value": "Is there a 1?"}]
    parts = [{"type": "image", "url": str(picture)}, {"type": "text", "text": "Is there a 1?"}]
    own = asked("m", [{"role": "user", "content": parts}], {"max_new_tokens": 5})
    assert model.generate(message, dataset="POPE") == engine.generate([own.item], [own.media], 5)[0].text
    assert not model.use_custom_prompt("POPE")
    with pytest.raises(DataError, match="POPE: messages hold 'video'"):
        model.generate([{"type": "video", "value": "a.mp4"}], dataset="POPE")
