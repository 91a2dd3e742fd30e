//! Which ends of calls have been seen: every pair of an entry point and a status or insanity that the table
//! has must be, by the end of the program.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::{Insanity, Status};
use fluke_abi::entry::{Entry, Row, TABLE};
use libfluke::println;

use crate::caller::End;
use crate::handler;

/// Ends that were seen, by entry number: a bit for each status, and from [`INSANITIES`] on one for each
/// insanity.
static SEEN: [AtomicU64; 128] = [const { AtomicU64::new(0) }; 128];
const INSANITIES: u16 = 16;
/// Calls that ended as their rows do not say.
static UNEXPECTED: AtomicU64 = AtomicU64::new(0);

/// The bit of an end that the table knows.
fn bit(end: End) -> u64 {
    match end {
        End::Status(status) => 1 << status as u16,
        End::Insanity(insanity) => 1 << (INSANITIES + insanity as u16),
        _ => 0,
    }
}

/// Whether the table says that a call can end so. One that returns a value succeeds.
fn possible(row: &Row, end: End) -> bool {
    match end {
        End::Status(Status::Success) => true,
        End::Status(status) => row.may_return(status),
        End::Insanity(insanity) => row.may_raise(insanity),
        // A page fault without a keeper, mostly.
        End::Exception(_) => true,
        End::Hangs | End::Other(_) => false,
    }
}

/// Why no call of this program can end so, though the table has it.
fn elsewhere(row: &Row, end: End) -> Option<&'static str> {
    Some(match (Entry::from_number(row.number)?, end) {
        (_, End::Status(Status::NoMemory)) => "`exhaust` does",
        (Entry::machine_exit, End::Status(_)) => "the root program's does, and ends the machine",
        (Entry::supervisor_call, End::Status(_)) => "drivers' do",
        (Entry::supervisor_call, End::Insanity(Insanity::InvalidAddress)) => {
            "only a driver's could, and the kernel would panic"
        }
        _ => return None,
    })
}

/// Notes how a call ended, and checks it against the table.
pub fn ended(row: &Row, end: End) {
    SEEN[row.number as usize].fetch_or(bit(end), Relaxed);
    if !possible(row, end) {
        println!(
            "wild: {} ended with {end:x?}, which its row does not have",
            row.name
        );
        UNEXPECTED.fetch_add(1, Relaxed);
    }
}

/// As [`ended`], with the result of the call.
pub fn check(row: &Row, result: u64) {
    let end = match End::of(result) {
        // It goes to where the last exception was raised, with the result of then.
        end if row.number == Entry::thread_return_from_exception as u16 => {
            if end != End::Insanity(Insanity::NotCurrentThread) {
                return;
            }
            end
        }
        _ if row.returns_value() && handler::raised(result).is_none() => {
            End::Status(Status::Success)
        }
        end => end,
    };
    ended(row, end);
}

/// Says which pairs have not been seen, and which were that could not be; how many, and how many calls ended
/// as their rows do not say.
pub fn wrong() -> u64 {
    let statuses = Status::ALL.iter().map(|&status| End::Status(status));
    let insanities = Insanity::ALL
        .iter()
        .map(|&insanity| End::Insanity(insanity));
    let ends = statuses.chain(insanities);
    let (mut pairs, mut wrong) = (0, 0);
    for row in TABLE.iter().filter(|row| row.built) {
        for end in ends.clone().filter(|&end| possible(row, end)) {
            let seen = SEEN[row.number as usize].load(Relaxed) & bit(end) != 0;
            match (seen, elsewhere(row, end)) {
                (true, None) => pairs += 1,
                (false, Some(_)) => {}
                (false, None) => {
                    println!("wild: no call of {} ended with {end:?}", row.name);
                    wrong += 1;
                }
                (true, Some(why)) => {
                    println!("wild: {} ended with {end:?}; only {why}", row.name);
                    wrong += 1;
                }
            }
        }
    }
    println!("wild: {pairs} pairs of an entry point and how a call of it ends were seen");
    wrong + UNEXPECTED.load(Relaxed)
}
