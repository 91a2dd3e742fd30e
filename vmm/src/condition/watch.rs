//! What vCPUs ask, at each probe point, place or write that they come to: whether to pause.

use std::collections::BTreeMap;
use std::ops::Range;

use fluke_abi::entry::Entry;
use fluke_abi::layout::GATE_DONE;
use fluke_abi::probe::{Probe, WAIT_OTHER};
use kvm_bindings::kvm_regs;

use super::Hit;
use crate::inspect::brief::named;

/// What a condition looks for, in the numbers that vCPUs see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A probe point.
    Probe(Probe),
    /// Instructions.
    Place(Vec<u64>),
    /// Physical memory.
    Write(Vec<Range<u64>>),
    /// That many instructions on a vCPU.
    Instructions(u32),
}

/// A condition while the machine runs.
#[derive(Clone, Debug)]
pub struct Armed {
    pub target: Target,
    /// Address of the thread, where the kernel has it.
    pub address: Option<u64>,
    pub hash: Option<u64>,
    pub space: Option<u64>,
    pub call: Option<Entry>,
    /// Times to go.
    pub left: u64,
}

/// A probe point that a vCPU has come to; see `fluke_abi::probe`.
#[derive(Clone, Copy, Debug)]
struct Event {
    probe: Probe,
    thread: u64,
    hash: u64,
    call: Option<Entry>,
    rip: u64,
    space: u64,
    detail: u64,
}

impl Event {
    fn of(regs: &kvm_regs) -> Option<Self> {
        Some(Self {
            probe: Probe::from_number(regs.rax as u32)?,
            thread: regs.rdi,
            hash: regs.rsi,
            call: named(regs.rcx, regs.r8),
            rip: regs.r8,
            space: regs.r9,
            detail: regs.r10,
        })
    }
}

/// Whether a vCPU is to pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No.
    Further,
    /// Yes.
    Pause,
    /// Yes, because another one is to: it has to come here again when the machine runs on.
    Again,
}

/// The conditions of a machine, shared by its vCPUs.
#[derive(Debug, Default)]
pub struct Watch {
    pub conditions: Vec<Armed>,
    /// The call that each thread has come from user mode with, by the thread's address.
    pub begun: BTreeMap<u64, Entry>,
    /// Instructions to go on the vCPU where they are counted.
    pub instructions: u32,
    /// What has come true.
    pub found: Option<Found>,
}

/// Something has come true.
#[derive(Clone, Debug)]
pub struct Found {
    pub hit: Hit,
    /// Address of the thread, where the kernel has it, if the vCPU knows.
    pub thread: Option<u64>,
    /// Not before it is known that the thread that one of these conditions asks for runs.
    pub candidates: Vec<usize>,
}

impl Armed {
    fn is_about(&self, event: &Event, begun: Option<Entry>) -> bool {
        let or_any = |wanted: Option<u64>, is| wanted.is_none_or(|wanted| wanted == is);
        or_any(self.address, event.thread)
            && or_any(self.hash, event.hash)
            && or_any(self.space, event.space)
            && self
                .call
                .is_none_or(|call| begun == Some(call) || event.call == Some(call))
    }

    fn is_particular(&self) -> bool {
        let Self {
            address,
            hash,
            space,
            call,
            ..
        } = self;
        address.or(*hash).or(*space).is_some() || call.is_some()
    }

    /// One time less to go; whether it was the last.
    pub fn passes(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }
}

impl Watch {
    /// A vCPU has come to a probe point, with these registers.
    pub fn probe(&mut self, vcpu: u32, regs: &kvm_regs) -> Verdict {
        if self.found.is_some() {
            return Verdict::Again;
        }
        let Some(event) = Event::of(regs) else {
            return Verdict::Further;
        };
        let begun = match (event.probe, event.call) {
            (Probe::Enter, Some(call)) => {
                self.begun.insert(event.thread, call);
                Some(call)
            }
            (Probe::Exit, _) => match self.begun.remove(&event.thread) {
                Some(call) if event.rip == GATE_DONE => Some(call),
                // It is interrupted, or was in no call.
                _ => return Verdict::Further,
            },
            (Probe::Wait, _) if event.detail == WAIT_OTHER => return Verdict::Further,
            _ => self.begun.get(&event.thread).copied(),
        };
        let mut verdict = Verdict::Further;
        for (condition, armed) in self.conditions.iter_mut().enumerate() {
            let is = armed.target == Target::Probe(event.probe) && armed.is_about(&event, begun);
            if !is || !armed.passes() || verdict == Verdict::Pause {
                continue;
            }
            verdict = Verdict::Pause;
            self.found = Some(Found {
                hit: Hit {
                    condition,
                    vcpu,
                    thread: None,
                    begun,
                    call: event.call,
                    address: event.detail,
                },
                thread: Some(event.thread),
                candidates: Vec::new(),
            });
        }
        verdict
    }

    /// A vCPU has come to a place.
    pub fn place(&mut self, vcpu: u32, rip: u64) -> Verdict {
        if self.found.is_some() {
            return Verdict::Again;
        }
        self.find(vcpu, rip, |target| match target {
            Target::Place(places) => places.contains(&rip),
            _ => false,
        })
    }

    /// A vCPU has executed the instructions that were to be counted.
    pub fn counted(&mut self, vcpu: u32, rip: u64) -> Verdict {
        if self.found.is_some() {
            return Verdict::Again;
        }
        self.find(vcpu, rip, |target| *target == Target::Instructions(vcpu))
    }

    /// A vCPU has written to a page that is watched; the write is done.
    pub fn write(&mut self, vcpu: u32, pa: u64, size: usize) -> Verdict {
        if self.found.is_some() {
            // It cannot come again.
            return Verdict::Further;
        }
        let written = pa..pa + size as u64;
        let meets = |range: &Range<u64>| range.start < written.end && written.start < range.end;
        self.find(vcpu, pa, |target| match target {
            Target::Write(ranges) => ranges.iter().any(meets),
            _ => false,
        })
    }

    fn find(&mut self, vcpu: u32, address: u64, is: impl Fn(&Target) -> bool) -> Verdict {
        let mut candidates = Vec::new();
        let mut sure = None;
        for (n, armed) in self.conditions.iter_mut().enumerate() {
            if is(&armed.target) {
                if armed.is_particular() {
                    candidates.push(n);
                } else if armed.passes() {
                    sure = sure.or(Some(n));
                }
            }
        }
        let Some(&condition) = sure.as_ref().or(candidates.first()) else {
            return Verdict::Further;
        };
        if sure.is_some() {
            candidates.clear();
        }
        self.found = Some(Found {
            hit: Hit {
                condition,
                vcpu,
                thread: None,
                begun: None,
                call: None,
                address,
            },
            thread: None,
            candidates,
        });
        Verdict::Pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fluke_abi::layout::GATE;

    const THREAD: u64 = 0xffff_8000_0001_0000;

    fn event(probe: Probe, call: Entry, rip: u64) -> kvm_regs {
        kvm_regs {
            rax: probe as u64,
            rdi: THREAD,
            rsi: 77,
            rcx: call as u64,
            r8: rip,
            r9: 3,
            ..Default::default()
        }
    }

    fn armed(probe: Probe, call: Option<Entry>, left: u64) -> Armed {
        Armed {
            target: Target::Probe(probe),
            address: None,
            hash: None,
            space: None,
            call,
            left,
        }
    }

    fn watch(conditions: Vec<Armed>) -> Watch {
        Watch {
            conditions,
            ..Watch::default()
        }
    }

    #[test]
    fn a_call_counts_under_the_name_it_was_made_by_until_it_is_out() {
        use Entry::{cond_wait, mutex_lock};
        let mut watch = watch(vec![armed(Probe::Exit, Some(cond_wait), 1)]);
        let mut see = |probe, call, rip| watch.probe(0, &event(probe, call, rip));
        assert_eq!(see(Probe::Enter, cond_wait, GATE), Verdict::Further);
        assert_eq!(see(Probe::Wait, mutex_lock, GATE), Verdict::Further);
        assert_eq!(see(Probe::Exit, mutex_lock, GATE_DONE), Verdict::Pause);
        let hit = watch.found.take().unwrap().hit;
        assert_eq!((hit.begun, hit.call), (Some(cond_wait), None));
        // An interrupt in user code, where the call has just returned, is no second exit.
        let exit = event(Probe::Exit, mutex_lock, GATE_DONE);
        assert_eq!(watch.probe(0, &exit), Verdict::Further);
    }

    #[test]
    fn an_interrupted_call_has_no_exit() {
        let mut watch = watch(vec![armed(Probe::Exit, None, 1)]);
        let call = Entry::mutex_lock;
        watch.probe(0, &event(Probe::Enter, call, GATE));
        let out = event(Probe::Exit, call, 0x40_0000);
        assert_eq!(watch.probe(0, &out), Verdict::Further);
        let out = event(Probe::Exit, call, GATE_DONE);
        assert_eq!(watch.probe(0, &out), Verdict::Further);
    }

    #[test]
    fn the_last_of_a_count_pauses_and_others_come_again() {
        let mut watch = watch(vec![armed(Probe::Commit, None, 2)]);
        let commit = event(Probe::Commit, Entry::ref_check, GATE);
        assert_eq!(watch.probe(0, &commit), Verdict::Further);
        assert_eq!(watch.probe(1, &commit), Verdict::Pause);
        assert_eq!(watch.probe(0, &commit), Verdict::Again);
        assert_eq!(watch.place(0, 1), Verdict::Again);
        assert_eq!(watch.found.unwrap().hit.vcpu, 1);
    }

    #[test]
    fn filters_are_all_to_be_met() {
        let commit = event(Probe::Commit, Entry::ref_check, GATE);
        let sees = |change: fn(&mut Armed)| {
            let mut condition = armed(Probe::Commit, None, 1);
            change(&mut condition);
            watch(vec![condition]).probe(0, &commit) == Verdict::Pause
        };
        assert!(sees(
            |c| (c.hash, c.space, c.address) = (Some(77), Some(3), Some(THREAD))
        ));
        assert!(sees(|c| c.call = Some(Entry::ref_check)));
        assert!(!sees(|c| c.call = Some(Entry::ref_copy)));
        assert!(!sees(|c| c.hash = Some(78)));
        assert!(!sees(|c| c.space = Some(4)));
        assert!(!sees(|c| c.address = Some(0)));
        assert!(!sees(|c| c.target = Target::Probe(Probe::Wait)));
    }

    #[test]
    fn writes_meet_ranges_by_any_byte() {
        let mut condition = armed(Probe::Commit, None, 1);
        condition.target = Target::Write(std::iter::once(0x1000..0x1008).collect());
        let sees = |pa, size| watch(vec![condition.clone()]).write(0, pa, size) == Verdict::Pause;
        assert!(sees(0xfff, 2) && sees(0x1007, 1) && sees(0xf00, 0x1000));
        assert!(!sees(0xfff, 1) && !sees(0x1008, 8));
    }

    #[test]
    fn places_in_a_thread_are_looked_at_before_they_count() {
        let mut condition = armed(Probe::Commit, None, 1);
        condition.target = Target::Place(vec![5, 9]);
        assert_eq!(watch(vec![condition.clone()]).place(0, 6), Verdict::Further);
        condition.space = Some(1);
        let mut watch = watch(vec![condition]);
        assert_eq!(watch.place(0, 9), Verdict::Pause);
        assert_eq!(watch.found.unwrap().candidates, [0]);
        assert_eq!(watch.conditions[0].left, 1);
    }
}
