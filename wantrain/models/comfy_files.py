"""What ComfyUI's own examples call the files of a base; a variant that is not here has no workflow."""

_A14B = "wan2.2_{}_{{}}_noise_14B_fp8_scaled.safetensors"
FILES = {
    "wan21_t2v_1b3": "wan2.1_t2v_1.3B_fp16.safetensors", "wan21_t2v_14b": "wan2.1_t2v_14B_fp16.safetensors",
    "wan21_i2v_14b_480p": "wan2.1_i2v_480p_14B_fp16.safetensors",
    "wan21_i2v_14b_720p": "wan2.1_i2v_720p_14B_fp16.safetensors",
    "wan21_flf2v_14b": "wan2.1_flf2v_720p_14B_fp16.safetensors",
    "wan21_vace_1b3": "wan2.1_vace_1.3B_fp16.safetensors", "wan21_vace_14b": "wan2.1_vace_14B_fp16.safetensors",
    "wan21_fun_1b3_inp": "wan2.1_fun_inp_1.3B_bf16.safetensors",
    "wan21_fun_14b_inp": "Wan2.1-Fun-14B-InP.safetensors",
    "wan21_fun_1b3_control": "wan2.1_fun_control_1.3B_bf16.safetensors",
    "wan21_fun_14b_control": "Wan2.1-Fun-14B-Control.safetensors",
    "wan21_fun_v11_1b3_control": "Wan2.1-Fun-V1.1-1.3B-Control.safetensors",
    "wan21_fun_v11_14b_control": "Wan2.1-Fun-V1.1-14B-Control.safetensors",
    "wan21_fun_v11_1b3_camera": "wan2.1_fun_camera_v1.1_1.3B_bf16.safetensors",
    "wan21_fun_v11_14b_camera": "wan2.1_fun_camera_v1.1_14B_bf16.safetensors",
    "wan22_fun_a14b_control": _A14B.format("fun_control"), "wan22_fun_a14b_camera": _A14B.format("fun_camera"),
    "wan22_vace_fun_a14b": _A14B.format("fun_vace"),
    "wan22_fun_5b_control": "wan2.2_fun_control_5B_bf16.safetensors",
    "wan22_t2v_a14b": _A14B.format("t2v"), "wan22_i2v_a14b": _A14B.format("i2v"),
    "wan22_fun_a14b_inp": _A14B.format("fun_inpaint"), "wan22_ti2v_5b": "wan2.2_ti2v_5B_fp16.safetensors",
    "wan22_s2v_14b": "wan2.2_s2v_14B_bf16.safetensors", "wan22_animate_14b": "wan2.2_animate_14B_bf16.safetensors",
}
"""What the transformer's file is called in ComfyUI's own examples; {} is the expert."""

NOT_TAKEN = {"control_inpaint": "first"}
"""What ComfyUI's node of a task has no place for, of what the task may be given."""

AUDIO_FILE = "wav2vec2_large_english_fp16.safetensors"
TEXT_FILE, CLIP_VISION_FILE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "clip_vision_h.safetensors"
VAE_FILES = {"2.1": "wan_2.1_vae.safetensors", "2.2": "wan2.2_vae.safetensors"}
