"""A model directory as it is read: its config, its shards, and the files beside the weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from parampara.errors import InvalidData
from parampara.weights.tensor_files import TensorFile, TensorInfo

INDEX = "model.safetensors.index.json"
_COPIED = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|chat_template\.(jinja|json)|generation_config\.json|(LICENSE|NOTICE|USE_POLICY)(\.\w+)?"
)


class ModelFiles:
    """An opened model directory; shards are checked before anything is read from them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = self._config()
        self.files = [TensorFile(path) for path in sorted(directory.glob("*.safetensors"))]
        try:
            self.tensors, self.home = self._tensors()
        except BaseException:
            self.close()
            raise

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    def write_side_files(self, target: Path, dtype: str) -> None:
        """config.json with the new dtype; tokenizer, chat template, generation config and licence byte for byte."""
        config = {**self.config, "dtype": dtype}
        config.pop("torch_dtype", None)
        config.pop("_name_or_path", None)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in sorted(self.directory.iterdir()):
            if path.is_file() and _COPIED.fullmatch(path.name):
                shutil.copyfile(path, target / path.name)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def _config(self) -> dict[str, Any]:
        path = self.directory / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidData(f"{path}: can not be read ({error}).", param="model") from None
        if not isinstance(config, dict):
            raise InvalidData(f"{path}: is not a JSON object.", param="model")
        if config.get("quantization_config"):
            raise InvalidData(
                f"{self.directory}: a quantized model can not take adapters exactly; give the full-precision one.", param="model"
            )
        return config

    def _tensors(self) -> tuple[dict[str, TensorInfo], dict[str, TensorFile]]:
        home: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in home:
                    raise InvalidData(f"{self.directory}: tensor {name} is in {home[name].path.name} and {file.path.name}.", param="model")
                home[name] = file
        index = self.directory / INDEX
        if index.exists():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InvalidData(f"{index}: can not be read ({error}).", param="model") from None
            for name, shard in listed.items():
                if name not in home or home[name].path.name != shard:
                    missing = "the shard is missing" if not (self.directory / shard).exists() else "it is not there"
                    raise InvalidData(f"{self.directory}: tensor {name} should be in {shard}, but {missing}.", param="model")
        if not home:
            raise InvalidData(f"{self.directory} holds no *.safetensors file; convert the model to safetensors first.", param="model")
        return {name: file.tensors[name] for name, file in home.items()}, home
