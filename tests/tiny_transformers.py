"""Tiny random pipelines of every transformer family, in the true layouts."""

import copy
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Flux3DistilledModularPipeline,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from realera.miniature import TOKENIZER
from realera.mining.preservation_bank import bank_prompts

WIDTH = 32  # of every text encoder's rows but CLIP's
AXES = (4, 6, 6)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@cache
def sentence_pieces(bos: bool = False) -> PreTrainedTokenizerFast:
    """As T5's, with </s> behind; as Gemma's, with <bos> in front."""
    tokenizer = Tokenizer(tokenizer_models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<bos>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(bank_prompts(), trainer)
    single = "<bos> $A" if bos else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("</s>", "<bos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def chat_tokens() -> PreTrainedTokenizerFast:
    """Byte-level pairs with the marks of a chat, as Qwen's; pipelines set the side of padding."""
    return copy.deepcopy(_chat_tokens())


@cache
def _chat_tokens() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(bank_prompts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", chat_template=CHAT
    )


def clip(width: int, kind: type = CLIPTextModelWithProjection) -> dict:
    """Of the miniature's vocabulary: CLIP's own takes a second to read."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {"text_encoder": kind(config).eval(), "tokenizer": tokenizer}


def t5(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=700)
    return T5EncoderModel(config).eval()


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[32] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


LLM = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 800,
    "initializer_range": 0.3,  # so that a norm's epsilon is as little as in a trained one
}


def sd3(t5_too: bool = True) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=48,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    one, two = clip(16), clip(32)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        **one,
        **{name + "_2": part for name, part in two.items()},
        text_encoder_3=t5(64) if t5_too else None,
        tokenizer_3=sentence_pieces() if t5_too else None,
    )


FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": AXES,
}


def flux1() -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        **clip(16, CLIPTextModel),
        text_encoder_2=t5(),
        tokenizer_2=sentence_pieces(),
        transformer=FluxTransformer2DModel(**FLUX, pooled_projection_dim=16, guidance_embeds=True),
    )


def chroma() -> ChromaPipeline:
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=sentence_pieces(),
        transformer=ChromaTransformer2DModel(
            **FLUX,
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
    )


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.5],
    )


def qwen_image() -> QwenImagePipeline:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = Qwen2_5_VLConfig(
        text_config={**LLM, "rope_scaling": rope}, vision_config=vision, **LLM, rope_scaling=rope
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text).eval(),
        tokenizer=chat_tokens(),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=AXES,
        ),
    )


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=Qwen3Model(Qwen3Config(**LLM, head_dim=8)).eval(),
        tokenizer=chat_tokens(),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=list(AXES),
            axes_lens=[1536, 64, 64],
        ),
    )


def lumina2() -> Lumina2Pipeline:
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(),
        text_encoder=Gemma2Model(Gemma2Config(**LLM, head_dim=8)).eval(),
        tokenizer=sentence_pieces(bos=True),
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            cap_feat_dim=WIDTH,
            axes_dim_rope=AXES,
            axes_lens=(300, 64, 64),
        ),
    )


def qwen3_vl() -> Qwen3VLConfig:
    text = {
        **LLM,
        "head_dim": 8,
        "rope_parameters": {
            "mrope_section": [2, 1, 1],
            "rope_type": "default",
            "rope_theta": 10000.0,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision)


class TextProcessor(ProcessorMixin):
    """As Qwen3VLProcessor and PixtralProcessor, which need torchvision, for prompts alone."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        return self.tokenizer([text] if isinstance(text, str) else text, **options)


def qwen_image21() -> QwenImage21Pipeline:
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.5, 2.0, 1.0, 0.5],
        ),
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl()).eval(),
        processor=TextProcessor(chat_tokens(), CHAT),
        transformer=QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=WIDTH,
            axes_dims_rope=AXES,
        ),
    )


def krea2() -> Krea2Pipeline:
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(qwen3_vl()).eval(),
        tokenizer=chat_tokens(),
        text_encoder_select_layers=(1, 2, 3),
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=WIDTH,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=AXES,
        ),
    )


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=4,
        sample_size=64,
    )


def flux2_klein() -> Flux2KleinPipeline:
    text = Qwen3Config(**{**LLM, "num_hidden_layers": 27}, head_dim=8)  # rows of layers 9, 18, 27
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(text).eval(),
        tokenizer=chat_tokens(),
        transformer=Flux2Transformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


@cache
def mistral_processor() -> TextProcessor:
    """As Mistral's: marks around the system's and the user's turn, and padding in front."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    turns = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    special = ["<unk>", "<s>", "</s>", "<pad>", *turns, "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(bank_prompts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", padding_side="left"
    )
    template = (
        "{{ bos_token }}{% for m in messages %}{% set text = m['content'][0]['text'] %}"
        "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
        "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
    )
    return TextProcessor(fast, template)


def flux2_dev() -> Flux2Pipeline:
    # Rows of layers 10, 20 and 30, none of them behind the last norm.
    text = {**LLM, "num_hidden_layers": 31, "head_dim": 8, "model_type": "mistral"}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    klein = flux2_klein()
    return Flux2Pipeline(
        scheduler=klein.scheduler,
        vae=klein.vae,
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=text, vision_config=vision)
        ).eval(),
        tokenizer=mistral_processor(),
        transformer=Flux2Transformer2DModel.from_config(
            klein.transformer.config, guidance_embeds=True
        ),
    )


def flux3_klein(flow_map: bool = False) -> Flux3ModularPipeline:
    text = qwen3_vl()
    text.text_config.num_hidden_layers = 33  # rows of layers 4, 8, ..., 32
    tokenizer = chat_tokens()
    tokenizer.padding_side = "left"  # which the pipeline does not heed
    kind = Flux3DistilledModularPipeline if flow_map else Flux3ModularPipeline
    blocks = kind().blocks
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = kind(blocks)
    pipeline.update_components(
        text_encoder=Qwen3VLForConditionalGeneration(text).eval(),
        tokenizer=TextProcessor(tokenizer, CHAT),
        vae=flux2_vae(),
        transformer=Flux3Transformer2DModel(
            in_channels=4,
            cond_in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * WIDTH,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=flow_map,
        ),
    )
    return pipeline


FAMILIES = {
    "sd3": sd3,
    "flux1": flux1,
    "chroma": chroma,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "lumina2": lumina2,
    "qwen_image21": qwen_image21,
    "krea2": krea2,
    "flux2_klein": flux2_klein,
    "flux2_dev": flux2_dev,
    "flux3_klein": flux3_klein,
}


@torch.no_grad()
def tiny(name: str):
    """A random pipeline of the family whose every layer that text passes is live."""
    torch.manual_seed(0)
    pipeline = FAMILIES[name]()
    for parameter in pipeline.transformer.parameters():
        # Some are zero by design until they are trained, and nothing would be drawn by the text.
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(0, 0.05)
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pipeline.default_sample_size = 8
    return pipeline
