//! Running a machine until a condition comes true.

use std::collections::BTreeSet;
use std::iter::once;
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fluke_abi::entry::Entry;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::probe::Probe;

use super::watch::{Armed, Found, Target, Watch};
use super::{Condition, Hit, PLACES_MAX, Place, Until, What, Who};
use crate::crash::Symbols;
use crate::doctor;
use crate::error::Error;
use crate::inspect;
use crate::inspect::brief::{self, Brief, Thread};
use crate::paging::translate;
use crate::point::Point;
use crate::stop::StopReason;
use crate::vcpu::{Command, PauseReason, Report};
use crate::vm::Vm;

impl From<inspect::Error> for Error {
    fn from(error: inspect::Error) -> Self {
        Self::Config(error.to_string())
    }
}

impl Vm {
    /// Lets the machine run until one of the conditions comes true, it stops for good, or `limit` has passed.
    /// All vCPUs are paused then. Without conditions it runs to its end.
    ///
    /// Where more than one comes true at once, that is the first of them; what another vCPU comes to
    /// meanwhile it comes to again when the machine runs on, but for writes.
    ///
    /// # Errors
    /// If a condition is one of what does not exist, or this host cannot watch for it.
    pub fn run_until(&mut self, conditions: &[Condition], limit: Duration) -> Result<Until, Error> {
        if let Err(stop) = self.pause() {
            return Ok(Until::Stopped(stop));
        }
        let deadline = Instant::now().checked_add(limit);
        let watched = !conditions.is_empty();
        let seen = match watched {
            true => self.brief()?,
            false => Brief::default(),
        };
        let armed = self.arm_all(conditions, &seen)?;
        let mut probes = [0; Probe::ALL.len()];
        let mut places = [None; PLACES_MAX];
        let mut pages = BTreeSet::new();
        let mut counting = None;
        for condition in &armed {
            match &condition.target {
                Target::Probe(probe) => probes[*probe as usize] = 1,
                Target::Place(at) => add_places(&mut places, at)?,
                Target::Write(ranges) => pages.extend(ranges.iter().flat_map(pages_of)),
                Target::Instructions(vcpu) => counting = Some(*vcpu),
            }
        }
        let known = std::mem::take(&mut self.watching().begun);
        let in_calls = seen.threads.iter().filter(|thread| thread.in_call);
        let begun = in_calls.filter_map(|thread| {
            let known = known.get(&thread.address).copied();
            Some((thread.address, known.or(thread.call)?))
        });
        *self.watching() = Watch {
            conditions: armed,
            begun: begun.collect(),
            instructions: instructions(conditions),
            found: None,
        };
        if watched {
            // With what call each thread comes.
            probes[Probe::Enter as usize] = 1;
            probes[Probe::Exit as usize] = 1;
            self.arm_probes(&probes)?;
        }
        self.watch_pages(&pages)?;
        let until = self.run_watched(places, counting, deadline);
        self.watch_pages(&BTreeSet::new())?;
        if watched {
            self.arm_probes(&[0; Probe::ALL.len()])?;
        }
        self.watching().conditions.clear();
        until
    }

    fn run_watched(
        &mut self,
        places: [Option<u64>; PLACES_MAX],
        counting: Option<u32>,
        deadline: Option<Instant>,
    ) -> Result<Until, Error> {
        let mut again = BTreeSet::new();
        loop {
            self.control.start();
            for (id, vcpu) in (0..).zip(&self.vcpus) {
                let stay = again.contains(&id);
                let count = self.watching().instructions;
                vcpu.send(Command::RunTo(match counting == Some(id) {
                    true => Point::Instructions { count, places },
                    false => Point::Any { places, stay },
                }));
            }
            let mut late = false;
            loop {
                let left = deadline.map_or(Duration::MAX, |end| end.duration_since(Instant::now()));
                match self.control.next_report(left) {
                    Ok(Some((_, Report::Reached))) => break,
                    Ok(Some((_, report))) if report.end().is_none() => {}
                    Err(_) => {
                        late = true;
                        break;
                    }
                    Ok(_) => break,
                }
            }
            again = match self.settle() {
                Ok(again) => again,
                Err(stop) => return Ok(Until::Stopped(stop)),
            };
            let found = self.watching().found.take();
            if let Some(found) = found
                && let Some(hit) = self.hit(found)?
            {
                return Ok(Until::Hit(hit));
            }
            if late {
                return Ok(Until::Late);
            }
        }
    }

    /// Pauses all vCPUs. Those that have to come again to where they are.
    fn settle(&mut self) -> Result<BTreeSet<u32>, StopReason> {
        let mut again = BTreeSet::new();
        self.pause_all(|id, report| {
            if matches!(report, Report::Paused(PauseReason::Again)) {
                again.insert(id);
            }
        })?;
        Ok(again)
    }

    /// What was found, if it is what was asked for.
    fn hit(&mut self, found: Found) -> Result<Option<Hit>, Error> {
        let Found {
            mut hit,
            thread,
            candidates,
        } = found;
        let seen = self.brief()?;
        let about = match thread {
            Some(address) => seen.threads.iter().find(|thread| thread.address == address),
            None => seen.on(hit.vcpu),
        };
        if let Some(about) = about {
            hit.thread = Some(about.number);
            hit.call = hit.call.or(about.call);
        }
        let begun = about.and_then(|about| self.watching().begun.get(&about.address).copied());
        hit.begun = hit.begun.or(begun);
        if candidates.is_empty() {
            return Ok(Some(hit));
        }
        let mut watch = self.watching();
        let is = |armed: &Armed| about.is_some_and(|about| armed.is_for(about, hit.begun));
        for condition in candidates {
            let armed = &mut watch.conditions[condition];
            if is(armed) && armed.passes() {
                hit.condition = condition;
                return Ok(Some(hit));
            }
        }
        Ok(None)
    }

    /// The machine goes on in another way: the calls that threads came with are not known any more.
    pub(crate) fn forget_calls(&self) {
        self.watching().begun.clear();
    }

    fn watching(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn brief(&mut self) -> Result<Brief, Error> {
        Ok(self.look(brief::brief)?)
    }

    fn arm_probes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let at = self.look(brief::armed)?;
        self.memory.write(at, bytes)
    }

    fn arm_all(&mut self, conditions: &[Condition], seen: &Brief) -> Result<Vec<Armed>, Error> {
        let image = self.image.clone();
        let image = image.as_ref().ok_or(inspect::Error::NoKernel)?;
        let arm = |condition: &Condition| {
            let target = match &condition.what {
                What::Probe(probe) => Target::Probe(*probe),
                What::Place(place) => Target::Place(addresses_of(place, image)?),
                What::Write {
                    space,
                    address,
                    size,
                } => Target::Write(self.physical(*space, *address, *size, seen)?),
                What::Instructions { vcpu, .. } => {
                    self.check_counting(*vcpu, conditions)?;
                    Target::Instructions(*vcpu)
                }
            };
            let address = match condition.thread {
                Some(Who::Number(number)) => {
                    let found = seen.threads.iter().find(|thread| thread.number == number);
                    let none = || Error::Config(format!("there is no thread {number}"));
                    Some(found.ok_or_else(none)?.address)
                }
                _ => None,
            };
            let hash = match condition.thread {
                Some(Who::Hash(hash)) => Some(hash),
                _ => None,
            };
            Ok(Armed {
                target,
                address,
                hash,
                space: condition.space,
                call: condition.call,
                left: condition.count,
            })
        };
        conditions.iter().map(arm).collect()
    }

    fn check_counting(&self, vcpu: u32, conditions: &[Condition]) -> Result<(), Error> {
        let counts = |c: &&Condition| matches!(c.what, What::Instructions { .. });
        let why = match conditions.iter().filter(counts).count() {
            _ if vcpu as usize >= self.vcpus.len() => format!("there is no vCPU {vcpu}"),
            2.. => "instructions can be counted on one vCPU at a time".into(),
            _ => return check_breakpoints(),
        };
        Err(Error::Config(why))
    }

    /// Where memory is that a space has; or that physical memory.
    fn physical(
        &self,
        space: Option<u64>,
        address: u64,
        size: u64,
        seen: &Brief,
    ) -> Result<Vec<Range<u64>>, Error> {
        let end = address
            .checked_add(size.max(1))
            .filter(|_| size <= self.memory.size());
        let end = end.ok_or_else(|| Error::Config(format!("{size} bytes are too many")))?;
        let Some(space) = space else {
            return match end <= self.memory.size() {
                true => Ok(once(address..end).collect()),
                false => Err(Error::Config(format!("there is no memory at {address:#x}"))),
            };
        };
        let mut tables = seen.page_tables.iter();
        let table = tables.find(|(number, _)| *number == space);
        let none = || Error::Config(format!("there is no space {space}"));
        let (_, table) = *table.ok_or_else(none)?;
        let mut at = address;
        let mut ranges = Vec::new();
        while at < end {
            let there = translate(&self.memory, table, at).ok_or_else(|| {
                Error::Config(format!(
                    "space {space} has no memory at {at:#x} yet; watch for writes once it has, such as \
                     after a soft fault there"
                ))
            })?;
            let bytes = there.left.min(end - at);
            ranges.push(there.pa..there.pa + bytes);
            at += bytes;
        }
        Ok(ranges)
    }
}

impl Armed {
    fn is_for(&self, thread: &Thread, begun: Option<Entry>) -> bool {
        self.address.is_none_or(|address| address == thread.address)
            && self.hash.is_none_or(|hash| hash == thread.hash)
            && self.space.is_none_or(|space| thread.space == Some(space))
            && self.call.is_none_or(|call| {
                begun == Some(call) || thread.in_call && thread.call == Some(call)
            })
    }
}

/// Warns where breakpoints may not work: the doctor's patience may also have ended on a busy host.
fn check_breakpoints() -> Result<(), Error> {
    if !doctor::probe()?.hardware_breakpoints {
        tracing::warn!("no breakpoint stopped a guest of `flukevm doctor` on this host");
    }
    Ok(())
}

/// How many instructions are to be counted, if any are.
fn instructions(conditions: &[Condition]) -> u32 {
    let counts = conditions
        .iter()
        .find_map(|condition| match condition.what {
            What::Instructions { count, .. } => Some(count),
            _ => None,
        });
    counts.unwrap_or(0)
}

fn pages_of(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    let first = range.start & !(PAGE_SIZE - 1);
    (first..range.end).step_by(PAGE_SIZE as usize)
}

fn add_places(places: &mut [Option<u64>], addresses: &[u64]) -> Result<(), Error> {
    check_breakpoints()?;
    for &address in addresses {
        if places.contains(&Some(address)) {
            continue;
        }
        let free = places.iter_mut().find(|place| place.is_none());
        *free.ok_or_else(|| {
            Error::Config(format!(
                "more than {PLACES_MAX} breakpoints are too many at once; a line has one in each function \
                 that it is part of"
            ))
        })? = Some(address);
    }
    Ok(())
}

fn addresses_of(place: &Place, image: &[u8]) -> Result<Vec<u64>, Error> {
    let symbols = || Symbols::new(image).ok_or(inspect::Error::NoKernel);
    match place {
        Place::Address(address) => Ok([*address].into()),
        Place::Symbol(name) => {
            let found = symbols()?.find(name);
            Ok([one(&found, &format!("function `{name}`"))?].into())
        }
        Place::Line(file, line) => {
            let found = symbols()?.find_line(file, *line);
            match found.is_empty() {
                false => Ok(found),
                true => Err(Error::Config(format!(
                    "the kernel has no code of line {line} of a file `{file}`"
                ))),
            }
        }
    }
}

fn one(found: &[(u64, String)], what: &str) -> Result<u64, Error> {
    match found {
        [(address, _)] => Ok(*address),
        [] => Err(Error::Config(format!(
            "the kernel has no {what} that is not inlined; give a line or an address"
        ))),
        [(_, first), (_, second), ..] => Err(Error::Config(format!(
            "the kernel has more than one {what}: {first}, {second}"
        ))),
    }
}
