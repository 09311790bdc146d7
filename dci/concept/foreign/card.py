"""The card of an export: what it is, what to type, where the files go, what is not in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dci.concept.foreign.custom_diffusion import WEIGHTS
from dci.concept.foreign.metadata import family

if TYPE_CHECKING:
    from dci.concept.foreign.export import Export

CARD = "README.md"
_FAMILIES = {
    "sd-v1": "Stable Diffusion 1.x",
    "sd-v2": "Stable Diffusion 2.x",
    "sd-v2-v": "Stable Diffusion 2.x (v)",
    "sdxl": "Stable Diffusion XL",
}


@dataclass(frozen=True)
class Card:
    """The facts that a card is written from."""

    done: Export
    to: str
    rank: int | None
    bundle: bool
    as_folder: bool

    def text(self) -> str:
        """Return the card in Markdown."""
        done, concept = self.done, self.done.concept
        files = "\n".join(f"* `{file.name}`" for file in done.files)
        lost = "\n".join(f"* {line}" for line in self._lost())
        return f"""# {done.name}

| | |
|---|---|
| base model | {concept.base_name or done.model.config.name} ({_FAMILIES[family(done.model.config)]}) |
| its fingerprint | {concept.base or "not known"} |
| class noun | {", ".join(name.class_noun for name in concept.names)} |
| format | {self.to}{f", rank {self.rank}" if self.rank else ""} |
| the concept in prompts | `{done.prompt}` |

{files}

{self._programs()}
## What these files do not carry

{lost}
"""

    def _lost(self) -> list[str]:
        lost = ["The image-specific contexts, which only further study needs."]
        lost += [] if self.to == "checkpoint" else ["A check that the base model is the right one: see to it yourself."]
        loras = ", ".join(f"`{lora}`" for lora in self.done.concept.trained_on.loras)
        if loras and self.to != "checkpoint":
            how = "load them too" if self.to in ("lora", "diff") else "of their changes, those of the same weights are here"
            lost += [f"The LoRAs that the concept was trained on ({loras}): {how}."]
        if self.to in ("adobe", "diffusers"):
            lost += ["The class noun: it is in this card.", "A strength: the weights are whole, not changes."]
        if self.to == "checkpoint":
            lost += ["The tokens are in the file beside it: programs have no room for them in a checkpoint."]
        if self.rank:
            lost += [line[0].upper() + line[1:] + "." for line in self.done.said[:1]]
        if self.done.left:
            lost += [
                f"The changes of {len(self.done.left)} weights, which this format has no place for: "
                f"{', '.join(sorted(self.done.left)[:3])}{', ...' if len(self.done.left) > 3 else ''}."
            ]
        return lost

    def _programs(self) -> str:
        parts = {
            "lora": (self._webui, self._comfy, self._diffusers_lora, self._sd_scripts),
            "diff": (self._webui, self._comfy),
            "diffusers": (self._diffusers_custom,),
            "adobe": (self._adobe,),
            "checkpoint": (self._webui, self._comfy, self._diffusers_model),
        }
        return "\n".join(part() for part in parts[self.to])

    @property
    def _weights(self) -> str:
        return f"{self.done.name}-{self.to}.safetensors"

    @property
    def _words(self) -> list[str]:
        return list(self.done.embeddings())

    def _token_files(self, folder: str) -> str:
        named = ", ".join(f"`{word}.safetensors`" for word in self._words)
        inside = ", unless the program takes those inside the LoRA" if self.bundle else ""
        return f"* {named} into `{folder}`{inside}\n" if named else ""

    def _webui(self) -> str:
        model = self.to == "checkpoint"
        folder, call = ("models/Stable-diffusion", "") if model else ("models/Lora", f" <lora:{self._weights[:-12]}:1>")
        place = "" if self.as_folder else f"* `{self._weights}` into `{folder}/`\n"
        return f"""## A1111, Forge

{place}{self._token_files("embeddings/")}* prompt: `photo of {self.done.prompt} on the beach{call}`
"""

    def _comfy(self) -> str:
        words = self.done.prompt
        for word in self._words:
            words = words.replace(word, f"embedding:{word}", 1)
        folder = "models/checkpoints/" if self.to == "checkpoint" else "models/loras/"
        node = "" if self.to == "checkpoint" else " (node LoraLoader)"
        place = "" if self.as_folder else f"* `{self._weights}` into `{folder}`{node}\n"
        first = self._words[0] if self._words else "name"
        return f"""## ComfyUI

{place}{self._token_files("models/embeddings/")}* prompt: `photo of {words} on the beach`

InvokeAI: add the same files with its model manager; in prompts the embedding is `<{first}>`.
"""

    @property
    def _pipeline(self) -> str:
        return "StableDiffusionXLPipeline" if self.done.layers.text_2 else "StableDiffusionPipeline"

    def _load_token(self, word: str) -> str:
        if not self.done.layers.text_2:
            return f'pipe.load_textual_inversion("{word}.safetensors", token="{word}")\n'
        return f"""rows = load_file("{word}.safetensors")
pipe.load_textual_inversion(rows["clip_l"], token="{word}", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
pipe.load_textual_inversion(rows["clip_g"], token="{word}", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
"""

    def _python(self, load: str) -> str:
        tokens = "".join(self._load_token(word) for word in self._words)
        if tokens and self.done.layers.text_2:
            tokens = f"from safetensors.torch import load_file\n\n{tokens}"
        return f"""## diffusers

```python
{load}
{tokens}pipe("photo of {self.done.prompt} on the beach")
```
"""

    def _diffusers_lora(self) -> str:
        note = "\nThis file holds the tokens too, which diffusers refuses: for it, export without the bundle.\n"
        return self._python(f'pipe.load_lora_weights("{self._weights}")') + (note if self.bundle else "")

    def _diffusers_custom(self) -> str:
        note = "The keyword `_pipeline` is needed: without it current versions cannot put the processors in place.\n"
        return self._python(f'pipe.unet.load_attn_procs("FOLDER", weight_name="{WEIGHTS}", _pipeline=pipe)') + "\n" + note

    def _diffusers_model(self) -> str:
        if self.as_folder:
            return self._python(f'pipe = {self._pipeline}.from_pretrained("{self.done.name}-diffusers")')
        return self._python(f'pipe = {self._pipeline}.from_single_file("{self._weights}")')

    def _sd_scripts(self) -> str:
        tokens = " ".join(f"{word}.safetensors" for word in self._words)
        further = f" --textual_inversion_embeddings {tokens}" if tokens else ""
        return f"""## sd-scripts

```
python gen_img.py ... --network_module networks.lora --network_weights {self._weights}{further}
```
"""

    def _adobe(self) -> str:
        tokens = " ".join(self.done.concept.modifier_tokens)
        nouns = " and ".join(f"{' '.join(name.modifier_tokens)} {name.class_noun}" for name in self.done.concept.names)
        return f"""## Custom Diffusion

* `delta.ckpt`: `python sample.py --delta_ckpt delta.ckpt --ckpt BASE.ckpt --prompt "photo of {nouns} on the beach"`
* `delta.bin`: `--delta_ckpt delta.bin` of the scripts for diffusers
* its tokens, in order: `{tokens}`
"""
