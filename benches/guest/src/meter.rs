//! Measuring pieces of work: with the time-stamp counter, or by telling the host where they begin and end.
//!
//! What is measured is printed in lines of words, which the host reads:
//!
//! | line | meaning |
//! | --- | --- |
//! | `sample NAME OPERATIONS CYCLES...` | how long so many operations took, each time that they were done |
//! | `total CYCLES` | the sum of all samples of the program |
//! | `figure NAME VALUE` | something else that is known, such as a digest |

use alloc::vec::Vec;
use core::arch::x86_64::_rdtsc;

use fluke_abi::bench::{Mark, News};
use libfluke::{print, println, startup, sys};

/// How often one operation of a piece of work is counted, if not said. What the clock brings with it is not in all of them.
const COUNTED_TIMES: u64 = 3;

/// The time-stamp counter.
#[inline(always)]
pub fn cycles() -> u64 {
    // SAFETY: every x86-64 CPU has it, and the kernel leaves it to programs.
    unsafe { _rdtsc() }
}

/// What a user wants, `NAME=VALUE` each; `count` alone is enough.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The host counts: each operation is done between two marks.
    pub count: bool,
    /// How often each piece of work is done, or counted.
    pub batches: u64,
    /// How many times the operations that it has on a slow host.
    pub scale: u64,
    /// Only pieces of work whose names begin so.
    pub only: &'static str,
    /// Bytes, of those who use memory; 0 if not said.
    pub bytes: u64,
    /// Nanoseconds between two ticks of `flukeperf`'s watch; 0 if there is none.
    pub period: u64,
    /// Threads that `flukeperf` puts to sleep, and nothing else; 0 if it is to measure.
    pub threads: u64,
    /// Pairs of a client and a server of `flukeperf`'s, and nothing else; 0 if it is to measure.
    pub pairs: u64,
}

impl Options {
    /// Those among the program's arguments; the words of an argument that is none, if there is one.
    pub fn of_program() -> Result<Self, &'static str> {
        let mut options = Self {
            count: false,
            batches: 5,
            scale: 1,
            only: "",
            bytes: 0,
            period: 0,
            threads: 0,
            pairs: 0,
        };
        for word in startup::args().skip(1) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<u64>().map_err(|_| word);
            match name {
                "count" => {
                    options.count = true;
                    options.batches = match value {
                        "" => COUNTED_TIMES,
                        _ => number()?.max(1),
                    };
                }
                "batches" => options.batches = number()?.max(1),
                "scale" => options.scale = number()?.max(1),
                "only" => options.only = value,
                "bytes" => options.bytes = number()?,
                "period" => options.period = number()?,
                "threads" => options.threads = number()?,
                "pairs" => options.pairs = number()?,
                _ => return Err(word),
            }
        }
        Ok(options)
    }
}

/// Measures.
#[derive(Debug)]
pub struct Meter {
    options: Options,
    total: u64,
}

impl Meter {
    /// A meter that does what the options say.
    pub fn new(options: Options) -> Self {
        Self { options, total: 0 }
    }

    /// The options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Whether a piece of work is wanted.
    pub fn wants(&self, name: &str) -> bool {
        name == "nothing" || name.starts_with(self.options.only)
    }

    /// Measures an operation, done so many times in a row.
    pub fn measure(&mut self, name: &str, operations: u64, operation: impl FnMut()) {
        self.prepared(name, operations, || {}, operation);
    }

    /// The same with something to do before each time that is measured.
    pub fn prepared(
        &mut self,
        name: &str,
        operations: u64,
        mut prepare: impl FnMut(),
        mut operation: impl FnMut(),
    ) {
        if !self.wants(name) {
            return;
        }
        if self.options.count {
            // What the first time has to find, the others have.
            prepare();
            operation();
            for _ in 0..self.options.batches {
                prepare();
                self.tell(News::Begin, 1, name);
                operation();
                self.tell(News::End, 1, name);
            }
            return;
        }
        let operations = match operations {
            1 => 1,
            _ => operations * self.options.scale,
        };
        let mut samples = Vec::with_capacity(self.options.batches as usize);
        prepare();
        operation();
        for _ in 0..self.options.batches {
            prepare();
            let start = cycles();
            for _ in 0..operations {
                operation();
            }
            samples.push(cycles() - start);
        }
        self.report(name, operations, &samples);
    }

    /// Prints what was measured elsewhere.
    pub fn report(&mut self, name: &str, operations: u64, samples: &[u64]) {
        self.total += samples.iter().sum::<u64>();
        print!("sample {name} {operations}");
        samples.iter().for_each(|sample| print!(" {sample}"));
        println!();
    }

    /// Tells the host.
    pub fn tell(&self, news: News, operations: u64, name: &str) {
        let mark = Mark::new(news, operations, name);
        // SAFETY: the mark is there for as long as the host looks, which is during the call.
        unsafe { sys::machine_tell(&raw const mark as u64) };
    }

    /// The end of the program.
    pub fn done(&self) {
        if self.options.count {
            self.tell(News::Done, 0, "");
        } else {
            println!("total {}", self.total);
        }
    }
}
