//! Where a thread's marked call can be recognised, instruction by instruction.

use super::kernel::Kernel;
use super::types::Types;
use super::value::{Guest, Value, physical};
use super::{Error, Machine, Result};
use crate::point::{MarkedCall, RunningName};

/// What a machine is watched by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The call, on each CPU.
    pub calls: Vec<MarkedCall>,
    /// Physical addresses of the bytes by which the kernel says that it has let a CPU wait for an interrupt, and
    /// has not kicked it.
    pub idle: Vec<u64>,
    /// If the thread has a kernel stack of its own: its top, and the physical address of its stack pointer while
    /// the thread does not run, 0 if there is nothing on it.
    pub stack: Option<(u64, u64)>,
    /// Physical addresses of the words in which the kernel keeps times: that at which each CPU's timer will fire.
    pub times: Vec<u64>,
}

/// How to recognise a call of the thread with that hash whose caller has `mark` in `rbp`.
///
/// # Errors
/// If there is no such thread, or the kernel cannot be read.
pub fn marks(machine: &Machine<'_>, hash: u64, mark: u64) -> Result<Marks> {
    let types = Types::new(machine.image)?;
    let guest = Guest {
        types: &types,
        memory: machine.memory,
    };
    let kernel = Kernel::new(&guest)?;
    let address =
        |value: Value<'_>| physical(value.address).ok_or(Error::Unreadable(value.address));
    let (first, cpus) = kernel.scheduler.field("cpus")?.elements()?;
    let current = |cpu: u64| first.nth(cpu)?.field("current");
    let names = |bytes: Vec<u8>| Error::Image(format!("has names of {} bytes", bytes.len()));
    for thread in kernel.objects("thread")? {
        if thread.value.field("header")?.field("hash")?.int()? != hash {
            continue;
        }
        // As a CPU names whoever runs on it, with the thread's own name in the place of that one's.
        let mut running = None;
        for cpu in 0..cpus {
            let option = current(cpu)?;
            if let Some(id) = option.option()? {
                let mut name = RunningName::try_from(option.bytes()?).map_err(names)?;
                let own = thread.value.field("entity")?.bytes()?;
                let at = id.address.wrapping_sub(option.address) as usize;
                let place = name.get_mut(at..at + own.len());
                let place = place.ok_or_else(|| names(own.clone()))?;
                place.copy_from_slice(&own);
                running = Some(name);
            }
        }
        let thread_name = running.ok_or_else(|| Error::Misuse("no thread runs".into()))?;
        let saved_rbp = address(thread.value.field("frame")?.field("rbp")?)?;
        let call = |cpu| {
            Ok(MarkedCall {
                running: address(current(cpu)?)?,
                thread: thread_name,
                saved_rbp,
                mark,
            })
        };
        let (_, entity) = kernel.find(thread.value.field("entity")?)?;
        let stack = entity.map(|entity| entity.field("stack")).transpose()?;
        // Only one of the execution models has it.
        let stack =
            stack.and_then(|stack| Some((stack.field("top").ok()?, stack.field("pointer").ok()?)));
        let stack = stack.map(|(top, pointer)| Ok((top.int()?, address(pointer)?)));
        let word = |cpu, field| address(first.nth(cpu)?.field(field)?);
        return Ok(Marks {
            calls: (0..cpus).map(call).collect::<Result<_>>()?,
            stack: stack.transpose()?,
            idle: (0..cpus)
                .map(|cpu| word(cpu, "idle"))
                .collect::<Result<_>>()?,
            times: (0..cpus)
                .map(|cpu| word(cpu, "timer"))
                .collect::<Result<_>>()?,
        });
    }
    Err(Error::Misuse(format!("no thread has the hash {hash:#x}")))
}
