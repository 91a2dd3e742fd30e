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
use crate::ipc::{engine, fastpath};

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

/// What makes a row's call.
macro_rules! handler {
    (built regs $name:ident) => {
        $name
    };
    (built ipc ipc_call) => {
        fastpath::ipc_call
    };
    (built ipc ipc_reply_wait_receive) => {
        fastpath::ipc_reply_wait_receive
    };
    (built ipc $name:ident) => {
        engine::run
    };
    (missing $kind:ident $name:ident) => {
        no_entry
    };
}

fn no_entry(_: &mut Call) -> Done {
    Err(Insanity::NoEntry.into())
}

/// Entry numbers are below this.
pub const NUMBERS: usize = 128;

macro_rules! dispatch {
    ($($number:literal $kind:ident $name:ident $object:ident $class:ident $built:ident
       ($($parameter:ident: $ty:ty),*) [$($restart:ident),*] $doc:literal;)*) => {
        /// What makes each call, by its number.
        static HANDLERS: [fn(&mut Call) -> Done; NUMBERS] = {
            let mut handlers: [fn(&mut Call) -> Done; NUMBERS] = [no_entry; NUMBERS];
            $(handlers[$number] = handler!($built $kind $name);)*
            handlers
        };
    };
}

entry_points!(dispatch);

/// Makes the call that the thread's registers name.
#[inline]
pub fn dispatch(call: &mut Call) -> Done {
    let number = CallWord(call.frame().rax).number();
    let handler = HANDLERS.get(usize::from(number));
    handler.unwrap_or(&(no_entry as fn(&mut Call) -> Done))(call)
}
