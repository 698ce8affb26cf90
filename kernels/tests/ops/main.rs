//! Every op on every instruction set of this CPU against a naive oracle in f64.
//!
//! The oracles share nothing with the product. A case is computed on one thread and on two: the first result
//! must meet the oracle within its bound, the second must be the same bits.

mod attention;
mod golden;
mod harness;
mod light;
mod low_precision;
mod matmul;
mod oracle;
mod robust;
mod weights;
