//! The entry points, by object type, and their dispatch, generated from the table in `fluke_abi`.

mod cond;
mod generic;
mod ipc;
mod machine;
mod mapping;
mod mutex;
mod port;
mod pset;
mod reference;
mod region;
mod task;
mod thread;

use fluke_abi::code::Insanity;
use fluke_abi::entry_points;
use fluke_abi::ipc::CallWord;

use crate::call::{Call, Done};
use crate::ipc::engine;

use cond::*;
use generic::*;
use ipc::*;
use machine::*;
use mapping::*;
use mutex::*;
use port::*;
use pset::*;
use reference::*;
use region::*;
use task::*;
use thread::*;

/// What a row's call is.
macro_rules! handler {
    (built regs $name:ident $call:ident) => {
        $name($call)
    };
    (built ipc $name:ident $call:ident) => {
        engine::run($call)
    };
    (missing $kind:ident $name:ident $call:ident) => {
        Err(Insanity::NoEntry.into())
    };
}

macro_rules! dispatch {
    ($($number:literal $kind:ident $name:ident $object:ident $class:ident $built:ident
       ($($parameter:ident: $ty:ty),*) [$($restart:ident),*] $doc:literal;)*) => {
        /// Makes the call that the thread's registers name.
        #[inline]
        pub fn dispatch(call: &mut Call) -> Done {
            match CallWord(call.frame().rax).number() {
                $($number => handler!($built $kind $name call),)*
                _ => Err(Insanity::NoEntry.into()),
            }
        }
    };
}

entry_points!(dispatch);
