//! Scenes of the calls that do not sleep: one for each trivial or short entry point, made from its row in the table.
//! The target makes the call on objects of the right types, and then looks at what has become of them.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use fluke_abi::code::Status;
use fluke_abi::entry::{Class, Entry, Row, TABLE};
use fluke_abi::layout::{GATE_DONE, PAGE_SIZE};
use fluke_abi::state::{Prot, SavedState};
use libfluke::heap;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Task, Thread};
use libfluke::space::{Export, READ_WRITE};
use libfluke::startup::startup;

use super::scenes::{Scene, VIEW, owned_mutex, partner, scene, script};
use crate::caller::{Call, plain};
use crate::handler::handlers;

/// Entry points of which there is no scene: one tells the time, the others the host.
const LEFT_OUT: [Entry; 3] = [Entry::clock_read, Entry::machine_exit, Entry::machine_tell];

/// Bytes for any state.
const STATE_BYTES: u64 = 1024;

/// Entry points that have a scene here, by name, and those of connections, which have theirs among the messages.
pub fn names() -> impl Iterator<Item = &'static str> {
    let short = |row: &&Row| matches!(row.class, Class::Trivial | Class::Short);
    let left_out = |row: &Row| LEFT_OUT.iter().any(|entry| entry.row().name == row.name);
    let rows = TABLE.iter().filter(short).filter(move |row| !left_out(row));
    // A mapping's end has one with more to it.
    rows.map(|row| row.name)
        .filter(|&name| name != Entry::mapping_destroy.row().name)
}

/// The entry point with that name.
fn named(name: &str) -> Option<Entry> {
    let row = TABLE.iter().find(|row| row.name == name)?;
    Entry::from_number(row.number)
}

/// Memory for an object, a state or a number, zero, and there.
fn blank() -> Result<u64, Status> {
    let memory = heap::pages(PAGE_SIZE).ok_or(Status::NoMemory)?;
    // SAFETY: the memory was just allocated.
    unsafe { (memory as *mut u8).write_bytes(0, PAGE_SIZE as usize) };
    Ok(memory)
}

/// An object of the type with that name.
fn object(kind: &str) -> Result<u64, Status> {
    let export = || Export::alloc(blank()?, PAGE_SIZE, READ_WRITE, None);
    Ok(match kind {
        "Thread" => Thread::alloc()?.handle() as u64,
        "Task" => Task::alloc()?.handle() as u64,
        "Region" => export()?.region().handle() as u64,
        "Mapping" => {
            let memory = blank()?;
            let export = Export::alloc(memory, PAGE_SIZE, READ_WRITE, None)?;
            let space = &startup().space;
            let mapping = export.map(memory, PAGE_SIZE, READ_WRITE, space, VIEW)?;
            mapping.handle() as u64
        }
        "Port" => Port::in_set(Pset::alloc()?, 7)?.handle() as u64,
        "Pset" => Pset::alloc()?.handle() as u64,
        "Mutex" => Mutex::alloc()?.handle() as u64,
        "Cond" => Cond::alloc()?.handle() as u64,
        _ => Ref::to(Mutex::alloc()?)?.handle() as u64,
    })
}

/// Parameters of a call, and what they lead to.
#[derive(Default)]
struct Parameters {
    values: Vec<u64>,
    /// The last object of the entry point's type: what comes of the call is seen there.
    object: Option<u64>,
    /// References.
    refs: Vec<u64>,
    /// A state that the call reads.
    read: bool,
    filled: Vec<(u64, u64)>,
}

impl Parameters {
    fn of(row: &Row) -> Result<Self, Status> {
        let mut parameters = Self::default();
        for &(name, ty) in row.parameters {
            let value = parameters.value(row, name, ty)?;
            parameters.values.push(value);
        }
        Ok(parameters)
    }

    fn value(&mut self, row: &Row, name: &str, ty: &str) -> Result<u64, Status> {
        let handlers = handlers();
        let Some((pointer, kind)) = ty.rsplit_once(' ') else {
            return Ok(match name {
                "prot" | "max_prot" => Prot::READ.bits(),
                "trap" => handlers.trap,
                "interrupt" => handlers.interrupt,
                "client_alert" => handlers.client_alert,
                "server_alert" => handlers.server_alert,
                _ => 0,
            });
        };
        if name == "cur_thread" {
            return Ok(0);
        }
        if kind == row.object {
            let at = match name.starts_with("new_") {
                true => blank()?,
                false => object(kind)?,
            };
            self.object = Some(at);
            if kind == "Ref" {
                self.refs.push(at);
            }
            return Ok(at);
        }
        match kind {
            "Ref" => {
                let reference = Ref::alloc()?.handle() as u64;
                self.refs.push(reference);
                return Ok(reference);
            }
            // How much of it there is depends on what else was done.
            "Census" => return blank(),
            _ => {}
        }
        let at = blank()?;
        if name == "hash" {
            // SAFETY: memory of its own.
            unsafe { *(at as *mut u64) = u64::from_le_bytes(*b"a number") };
        }
        self.read |= pointer.ends_with("const");
        self.filled
            .push((at, if kind == "u64" { 8 } else { STATE_BYTES }));
        Ok(at)
    }
}

/// Registers as after a call that has succeeded.
fn returned() -> SavedState {
    SavedState {
        rip: GATE_DONE,
        rflags: 0x202,
        ..SavedState::default()
    }
}

/// The scene of an entry point, if it is one of these.
pub fn find(entry: Entry, target: &'static Thread) -> Result<Option<Scene>, Status> {
    let row = entry.row();
    if !names().any(|name| name == row.name) {
        return Ok(None);
    }
    let mut parameters = Parameters::of(row)?;
    let mut mutexes = Vec::new();
    // The target may own it.
    match entry {
        Entry::mutex_trylock => mutexes.push(Mutex::alloc()?),
        Entry::mutex_unlock => mutexes.push(owned_mutex(target)?),
        _ => {}
    }
    if let Some(mutex) = mutexes.first() {
        parameters.values[0] = mutex.handle() as u64;
        parameters.object = Some(parameters.values[0]);
    }
    let mut calls = Vec::new();
    let saved = Box::leak(Box::new(returned())) as *mut SavedState as u64;
    match entry {
        Entry::thread_set_saved_state => parameters.values[1] = saved,
        Entry::thread_return_from_exception => {
            calls.push(plain(Entry::thread_set_saved_state, &[0, saved]));
        }
        // What is set is what was there.
        _ if parameters.read => {
            let get = named(&row.name.replace("_set_", "_get_"));
            calls.extend(get.map(|get| plain(get, &parameters.values)));
        }
        _ => {}
    }
    let marked = calls.len();
    calls.push(plain(entry, &parameters.values));
    calls.extend(looks(row, &mut parameters)?);
    Ok(Some(Scene {
        mutexes,
        filled: parameters.filled,
        ..scene(script(calls, marked), partner([]))
    }))
}

/// Calls that show what has come of it: the state of the object, and what references lead to.
fn looks(row: &Row, parameters: &mut Parameters) -> Result<Vec<Call>, Status> {
    let mut calls: Vec<_> = parameters
        .refs
        .iter()
        .map(|&at| plain(Entry::ref_hash, &[at]))
        .collect();
    let kind = row.name.split('_').next().unwrap_or_default();
    let state = named(&(String::from(kind) + "_get_state"));
    if let (Some(state), Some(at)) = (state, parameters.object) {
        let to = blank()?;
        parameters.filled.push((to, STATE_BYTES));
        calls.push(plain(state, &[at, to]));
    }
    Ok(calls)
}
