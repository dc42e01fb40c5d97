"""Model directories by name: here, or downloaded from huggingface.co."""

import re
from pathlib import Path


# What we read, and nothing that is a pickle or a program.
PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
            "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "special_tokens_map.json", "chat_template.jinja"]
REPOSITORY_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find_directory(name):
    """The directory of a model: the path itself, or a downloaded snapshot of the Hugging Face repository of that id.

    Raises FileNotFoundError saying what to do if there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise FileNotFoundError(f"{name} is a file; expected the directory of a model, which holds config.json and "
                                "safetensors files, or of an adapter")
    if not REPOSITORY_ID.fullmatch(str(name)):
        raise FileNotFoundError(f"{name}: no such directory; expected one, or a Hugging Face repository id such as "
                                "openai-community/gpt2")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), allow_patterns=PATTERNS))
    except ImportError:
        advice = 'to download a Hugging Face repository of that id: pip install -e ".[hub]"'
    except Exception as e:
        # No network, no such repository, no permission: the library's words say which.
        words = " ".join(str(e).split())[:200]
        advice = (f"a Hugging Face repository of that id could not be downloaded ({type(e).__name__}: {words}); "
                  "download it where you can, and name its directory")
    raise FileNotFoundError(f"{name}: no such directory here; {advice}")
