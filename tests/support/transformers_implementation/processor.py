"""The names of our processor.py, on top of transformers 5.23; see af3.py beside it."""

import torch
import transformers

whisper = transformers.WhisperFeatureExtractor(feature_size=128)


def log_mel(window):
    return whisper(window.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"][0]


def mel_filters():
    return torch.from_numpy(whisper.mel_filters.T).float()


class OurCall:
    def __call__(self, text, audio=None, **options):
        """There, a call takes finished templates. Here, a prompt is put into the template first."""
        texts = [text] if isinstance(text, str) else text
        if not texts[0].startswith("<|im_start|>"):
            audios = audio if isinstance(audio, list) else [audio] * len(texts)
            ways = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
            turns = [[user_turn(*row)] for row in zip(texts, audios, strict=True)]
            return self.apply_chat_template(turns, **ways, processor_kwargs=options)  # calls this
        batch = super().__call__(text=text, audio=audio, **options)
        if audio is not None:
            batch["feature_attention_mask"] = batch.pop("input_features_mask")
        return batch


def user_turn(text, audio):
    parts = [{"type": "text", "text": text}, {"type": "audio", "audio": audio}]
    return {"role": "user", "content": parts if audio is not None else parts[:1]}


class AudioFlamingo3Processor(OurCall, transformers.AudioFlamingo3Processor): ...


class MusicFlamingoProcessor(OurCall, transformers.MusicFlamingoProcessor): ...
