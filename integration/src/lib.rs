//! What the end-to-end tests share: [`gate`], which kernel and program images must pass, and [`probes`].

pub mod gate;
pub mod probes;
