//! A module for each table.

pub mod applications;
mod bias;
mod checkpoint;
mod classes;
mod extraction;
mod latency;
mod memory;
mod primitives;
mod promptness;
mod restart;
mod scaling;

use super::Tabulate;

/// All tables, in the order in which they are shown.
pub static ALL: &[&dyn Tabulate] = &[
    &classes::Classes,
    &restart::Restart,
    &applications::Table5,
    &bias::Bias,
    &latency::Latency,
    &memory::Memory,
    &primitives::Primitives,
    &extraction::Extraction,
    &promptness::Promptness,
    &checkpoint::Checkpoint,
    &scaling::Scaling,
];
