//! A VMM on the KVM API that boots the Fluke kernel and can stop it anywhere.
//!
//! [`vm::Vm`] is a machine, [`config::VmConfig`] what it is made of, [`stop::StopReason`] why it
//! stopped. The command `flukevm` is [`cli`].

pub mod alter;
pub mod api;
pub mod bench;
pub mod boot;
pub mod bus;
pub mod checkpoint;
pub mod cli;
pub mod condition;
pub mod config;
mod control;
pub mod count;
pub mod crash;
pub mod devices;
pub mod doctor;
pub mod error;
mod exit;
pub mod gdb;
pub mod image;
pub mod inspect;
mod kick;
pub mod kvm;
pub mod memory;
pub mod paging;
pub mod point;
pub mod profile;
pub mod pvh;
pub mod remote;
pub mod script;
pub mod snapshot;
pub mod stats;
pub mod stop;
pub mod stops;
pub mod store;
pub mod vcpu;
pub mod verify;
pub mod vm;
