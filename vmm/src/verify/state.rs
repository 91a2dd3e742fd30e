//! What is compared: states of the target, and outcomes of the scene.

use fluke_abi::audit::{LOST, MARK, Outcome, RAISED};
use fluke_abi::code::{Exception, Insanity, Status};
use fluke_abi::entry::{Entry, Row};
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::GATE;
use fluke_abi::state::Registers;
use serde::Serialize;

/// The state of the target, as the auditor found it; what means nothing is zero.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct State {
    /// The entry point that it is about to call, or none in user code.
    pub entry: Option<&'static str>,
    /// Its registers: rip, rax, rdi, rsi, rdx, r10, r8, r9, r12, r13, r14, r15, rbx, rbp, rsp, rflags.
    pub registers: [u64; 16],
}

impl State {
    pub(super) fn new(r: &Registers) -> Self {
        let calls = r.rip == GATE;
        let entry = Entry::from_number(CallWord(r.rax).number()).filter(|_| calls);
        Self {
            entry: entry.map(|entry| entry.row().name),
            // rcx and r11 are the trap instruction's.
            registers: [
                r.rip, r.rax, r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9, r.r12, r.r13, r.r14, r.r15,
                r.rbx, r.rbp, r.rsp, r.rflags,
            ],
        }
    }

    /// Whether it is that of the marked call, before it or behind it.
    pub fn is_in_call(&self) -> bool {
        self.registers[13] == MARK
    }

    /// Whether the call that it names, if it is the marked one or what is left of it, may be found there.
    pub(super) fn is_legal(&self, call: &Row) -> bool {
        let [rip, _, .., rbp, _, _] = self.registers;
        if rip != GATE {
            return true;
        }
        let rest = || call.restart_points.iter().map(|entry| entry.row().name);
        match self.entry {
            Some(name) if rbp == MARK => name == call.name || rest().any(|other| other == name),
            Some(_) => true,
            None => false,
        }
    }
}

/// In what an outcome differs from the undisturbed one.
pub fn difference(outcome: &Outcome, undisturbed: &Outcome) -> Option<String> {
    let pairs = |who, now: &[u64], then: &[u64]| {
        let mut pairs = now.iter().zip(then).enumerate();
        pairs
            .find(|(_, (now, then))| now != then)
            .map(|(n, (&now, &then))| {
                let (now, then) = (result(now), result(then));
                format!("call {} of the {who} ended with {now}, not {then}", n + 1)
            })
    };
    let left = |who, now: &[u64], then: &[u64]| {
        let n = now.iter().zip(then).position(|(now, then)| now != then)?;
        Some(format!(
            "after call {} of the {who}, other is left of its parameters",
            n + 1
        ))
    };
    pairs("target", &outcome.target, &undisturbed.target)
        .or_else(|| pairs("partner", &outcome.partner, &undisturbed.partner))
        .or_else(|| left("target", &outcome.target_left, &undisturbed.target_left))
        .or_else(|| left("partner", &outcome.partner_left, &undisturbed.partner_left))
        .or_else(|| {
            (outcome.memory != undisturbed.memory)
                .then(|| "the memory that the calls fill is otherwise".into())
        })
}

/// The result of a call for people.
fn result(rax: u64) -> String {
    let of = |mark: u64| rax >> 48 == mark >> 48;
    let (code, subcode) = (rax >> 32 & 0xffff, rax & 0xffff_ffff);
    let name = match Exception::from_number(code) {
        _ if of(LOST) => "lost registers".into(),
        Some(Exception::Insanity) if of(RAISED) => Insanity::from_number(subcode)
            .map_or("an insanity".into(), |insanity| {
                format!("the insanity {}", insanity.name())
            }),
        Some(exception) if of(RAISED) => format!("the exception {}", exception.name()),
        _ => CallWord(rax)
            .status()
            .map_or("no status", Status::name)
            .into(),
    };
    format!("{name} ({rax:#x})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_call_is_legal_and_nothing_else() {
        let state = |entry: Entry, rip, rbp| {
            State::new(&Registers {
                rax: entry as u64,
                rip,
                rbp,
                ..Registers::default()
            })
        };
        let call = Entry::cond_wait.row();
        assert!(state(Entry::cond_wait, GATE, MARK).is_legal(call));
        assert!(state(Entry::mutex_lock, GATE, MARK).is_legal(call));
        assert!(!state(Entry::mutex_unlock, GATE, MARK).is_legal(call));
        assert!(state(Entry::mutex_unlock, GATE, 0).is_legal(call));
        assert!(state(Entry::mutex_unlock, 0x1000, MARK).is_legal(call));
    }
}
