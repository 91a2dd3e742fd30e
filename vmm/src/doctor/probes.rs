//! The questions, each asked with a guest of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fluke_abi::boot::{Gate, KERNEL_CS, USER_CS};
use kvm_ioctls::Kvm;

use super::guests::{self, Label};
use super::machine::{Broken, Cpu, Event, Machine, WINDOW};
use super::watchdog::{Bounded, Stop, bounded};

/// A timed loop is long enough when it takes this.
const LONG_ENOUGH: Duration = Duration::from_millis(4);
/// Repetitions of a timed loop; the fastest counts.
const REPETITIONS: u32 = 5;
/// Vector of an invalid instruction, `ud2` among them.
const INVALID_OPCODE: u8 = 6;
const PAGE: u64 = 4096;
/// How long the syscall probe may take. It decides about the gate, and a busy host must not make
/// it another one.
const SYSCALL_LIMIT: Duration = Duration::from_secs(5);

fn boot(kvm: &Kvm, machine: Machine, entry: Label) -> Result<Cpu, Broken> {
    Cpu::new(kvm, &Arc::new(machine), 0, entry, Label::SyscallEntry)
}

/// Does `syscall` from CPL 3 come to CPL 0, and `sysret` back?
pub fn syscall(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    let kvm = Arc::clone(kvm);
    let probe = Bounded::start(move |stop| {
        let mut cpu = boot(&kvm, Machine::new(&kvm)?, Label::Syscall)?;
        for selector in [KERNEL_CS, KERNEL_CS, USER_CS] {
            cpu.expect(stop, Event::Mark(selector.into()))?;
        }
        Ok(())
    })?;
    probe.wait_for(SYSCALL_LIMIT)
}

/// Does SSE work at CPL 0?
pub fn sse(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    let kvm = Arc::clone(kvm);
    bounded(move |stop| boot(&kvm, Machine::new(&kvm)?, Label::Sse)?.expect(stop, Event::Mark(1)))
}

/// Does the timer of an x2APIC interrupt CPL 0 and CPL 3?
pub fn timer(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let machine = Machine::with_apic(&kvm)?;
        machine.handle(guests::TIMER_VECTOR, Label::Tick)?;
        let mut cpu = boot(&kvm, machine, Label::Timer)?;
        cpu.expect(stop, Event::Mark(1))?;
        cpu.expect(stop, Event::Mark(2))
    })
}

/// Does CPU 0 interrupt CPU 1?
pub fn ipi(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    let machine = Arc::new(Machine::with_apic(kvm)?);
    machine.handle(guests::IPI_VECTOR, Label::IpiSeen)?;
    let start = |id, entry| {
        let mut cpu = Cpu::new(kvm, &machine, id, entry, Label::SyscallEntry)?;
        cpu.wake()?;
        Bounded::start(move |stop| cpu.expect(stop, Event::Mark(1)))
    };
    let sender = start(0, Label::IpiSend)?;
    let waiter = start(1, Label::IpiWait);
    let sent = sender.wait();
    waiter?.wait().and(sent)
}

/// Does KVM stop after every instruction of a kernel? Returns nanoseconds for a step.
pub fn single_step(kvm: &Arc<Kvm>) -> Result<f64, Broken> {
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let mut cpu = boot(&kvm, Machine::new(&kvm)?, Label::Step)?;
        cpu.single_step(true)?;
        let start = Instant::now();
        for step in 1..=guests::STEP_INSTRUCTIONS {
            cpu.expect(stop, Event::Debug(Label::Step.address() + step))?;
        }
        let taken = start.elapsed();
        cpu.single_step(false)?;
        cpu.expect(stop, Event::Mark(1))?;
        Ok(taken.as_secs_f64() * 1e9 / guests::STEP_INSTRUCTIONS as f64)
    })
}

/// Does KVM stop after every instruction of a program?
pub fn single_step_cpl3(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let mut cpu = boot(&kvm, Machine::new(&kvm)?, Label::Step)?;
        cpu.drop_to_user()?;
        cpu.single_step(true)?;
        for step in 1..=guests::STEP_INSTRUCTIONS {
            cpu.expect(stop, Event::Debug(Label::Step.address() + step))?;
        }
        Ok(())
    })
}

/// Does KVM stop at breakpoints at CPL 0?
pub fn breakpoints(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let mut cpu = boot(&kvm, Machine::new(&kvm)?, Label::Break)?;
        cpu.break_at(Label::BreakCpl0)?;
        cpu.expect(stop, Event::Debug(Label::BreakCpl0.address()))?;
        cpu.single_step(false)?;
        cpu.expect(stop, Event::Mark(1))
    })
}

/// Does KVM stop at breakpoints at CPL 3?
pub fn breakpoints_cpl3(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let mut cpu = boot(&kvm, Machine::new(&kvm)?, Label::Break)?;
        cpu.break_at(Label::BreakCpl3)?;
        cpu.expect(stop, Event::Mark(1))?;
        cpu.expect(stop, Event::Debug(Label::BreakCpl3.address()))?;
        cpu.single_step(false)?;
        cpu.expect(stop, Event::Mark(2))
    })
}

/// Does the dirty log name the pages the guest writes to, and only those?
pub fn dirty_log(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    // Pages of one word of the log, away from everything that lies in memory.
    const WORD: usize = 4;
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let mut cpu = boot(&kvm, Machine::with_dirty_log(&kvm)?, Label::Write)?;
        for pages in [&[0, 2][..], &[5], &[]] {
            for page in pages {
                let address = (WORD as u64 * 64 + page) * PAGE;
                cpu.machine.write(guests::INPUT, address)?;
                cpu.expect(stop, Event::Mark(1))?;
            }
            let written = pages.iter().fold(0, |bits, page| bits | 1 << page);
            let log = cpu.machine.take_dirty_log()?;
            if log.get(WORD) != Some(&written) {
                let seen = log.get(WORD);
                return Err(Broken::Wrong(format!(
                    "dirty bits {seen:x?}, not {written:#x}"
                )));
            }
        }
        Ok(())
    })
}

/// Does a CPU that forgets its translations see what the host has written to its page tables?
pub fn host_page_tables(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    const PAGES: [u64; 2] = [0x8_0000, 0x9_0000];
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let mut cpu = boot(&kvm, Machine::new(&kvm)?, Label::Read)?;
        cpu.machine.write(guests::INPUT, WINDOW)?;
        for (mark, page) in (1u32..).zip(PAGES) {
            cpu.machine.write(page, mark.into())?;
            cpu.machine.map_window(page)?;
            cpu.flush()?;
            cpu.expect(stop, Event::Mark(mark))?;
        }
        Ok(())
    })
}

/// Can a machine's time-stamp counter be set?
pub fn tsc(kvm: &Arc<Kvm>) -> Result<(), Broken> {
    boot(kvm, Machine::new(kvm)?, Label::Write)?.move_time()
}

/// Nanoseconds for a turn of a guest that loops [`guests::INPUT`] times between marks 1 and 2.
fn time_loop(cpu: &mut Cpu, stop: &Stop) -> Result<f64, Broken> {
    let mut turns = 32_u64;
    let mut best = f64::INFINITY;
    let mut repetitions = 0;
    while repetitions < REPETITIONS {
        cpu.machine.write(guests::INPUT, turns)?;
        cpu.expect(stop, Event::Mark(1))?;
        let start = Instant::now();
        cpu.expect(stop, Event::Mark(2))?;
        let taken = start.elapsed();
        if taken < LONG_ENOUGH {
            let scale = 1.3 * LONG_ENOUGH.as_secs_f64() / taken.as_secs_f64().max(1e-9);
            turns = (turns as f64 * scale.clamp(1.5, 64.0)) as u64;
            continue;
        }
        best = best.min(taken.as_secs_f64() * 1e9 / turns as f64);
        repetitions += 1;
    }
    Ok(best)
}

fn time(kvm: &Arc<Kvm>, guest: Label) -> Result<f64, Broken> {
    let kvm = Arc::clone(kvm);
    bounded(move |stop| {
        let machine = Machine::new(&kvm)?;
        if guest == Label::Ud2Loop {
            machine.handle(INVALID_OPCODE, Label::Ud2Gate)?;
        }
        let mut cpu = Cpu::new(&kvm, &Arc::new(machine), 0, guest, Label::SyscallGate)?;
        time_loop(&mut cpu, stop)
    })
}

/// Nanoseconds for an instruction at CPL 0.
pub fn cpl0_instruction(kvm: &Arc<Kvm>) -> Result<f64, Broken> {
    Ok(time(kvm, Label::Cpl0Loop)? / guests::LOOP_INSTRUCTIONS)
}

/// Nanoseconds for an instruction at CPL 3.
pub fn cpl3_instruction(kvm: &Arc<Kvm>) -> Result<f64, Broken> {
    Ok(time(kvm, Label::Cpl3Loop)? / guests::LOOP_INSTRUCTIONS)
}

/// Nanoseconds from CPL 3 through the gate to CPL 0 and back.
pub fn round_trip(kvm: &Arc<Kvm>, gate: Gate) -> Result<f64, Broken> {
    time(
        kvm,
        match gate {
            Gate::Ud2 => Label::Ud2Loop,
            Gate::Syscall => Label::SyscallLoop,
        },
    )
}

/// Nanoseconds for an `out` that goes to the VMM and back.
pub fn pio_exit(kvm: &Arc<Kvm>, cpl0_instruction_ns: Option<f64>) -> Result<f64, Broken> {
    const LOOP_OVERHEAD: f64 = 2.0;
    let turn = time(kvm, Label::PioLoop)?;
    Ok((turn - LOOP_OVERHEAD * cpl0_instruction_ns.unwrap_or(0.0)).max(0.0))
}

#[cfg(test)]
mod tests {
    use std::sync::PoisonError;

    use super::super::{PROBING, machine};
    use super::*;

    #[test]
    fn guests_that_hang_are_stopped() {
        let _one = PROBING.lock().unwrap_or_else(PoisonError::into_inner);
        let (kvm, _) = machine::open().expect("this test needs a usable /dev/kvm");
        let kvm = Arc::new(kvm);
        let hung = [Label::Cpl0Loop, Label::Cpl3Loop, Label::IpiWait].map(|entry| {
            let kvm = Arc::clone(&kvm);
            let probe = Bounded::start(move |stop| {
                let machine = Machine::with_apic(&kvm)?;
                machine.write(guests::INPUT, u64::MAX)?;
                let mut cpu = boot(&kvm, machine, entry)?;
                while cpu.run(stop)? == Event::Mark(1) {}
                Ok(())
            });
            (entry, probe.unwrap())
        });
        for (entry, probe) in hung {
            let result = probe.wait();
            assert!(
                matches!(result, Err(Broken::Timeout(_))),
                "{entry:?}: {result:?}"
            );
        }
    }
}
