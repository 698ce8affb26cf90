//! Every op on every device, and on every instruction set of this CPU, against a naive oracle in f64.
//!
//! The oracles share nothing with the product. A case is computed on one thread and on two, or twice on
//! another device: the first result must meet the oracle within its bound, the second must be the same bits.

mod attention;
mod blocks;
mod conv;
mod delta_rule;
mod golden;
mod grouped;
mod harness;
mod int8;
mod isa;
mod light;
mod loss;
mod maps;
mod matmul;
mod optimizers;
mod oracle;
mod robust;
mod route;
mod soft;
mod state_space;
#[cfg(feature = "vulkan")]
mod vulkan;
mod weights;

/// A build that lacks what must not be skipped would skip it silently.
#[cfg(not(feature = "vulkan"))]
#[test]
fn what_is_required_is_built() {
    assert!(!harness::required("vulkan"), "POCKETLORA_REQUIRE has `vulkan`, but the tests lack the feature `vulkan`");
}
