//! The adapter methods, one a file: what PEFT calls them, what their files hold, and the pieces that work on a layer.

pub(super) mod adalora;
pub(super) mod bd_lora;
pub(super) mod beft;
pub(super) mod cartridge;
pub(super) mod delora;
pub(super) mod dora;
pub(super) mod gralora;
pub(super) mod hra;
pub(super) mod ia3;
pub(super) mod ln_tuning;
pub(super) mod loha;
pub(super) mod lokr;
pub(super) mod lora;
pub(super) mod lora_fa;
pub(super) mod miss;
pub(super) mod oft;
pub(super) mod p_tuning;
pub(super) mod prefix_tuning;
pub(super) mod prompt_tuning;
pub(super) mod road;
pub(super) mod shira;
pub(super) mod supertuning;
pub(super) mod trainable_tokens;
pub(super) mod vera;
