//! How long it takes until the state of a thread is in hand that is in the middle of a call.

use crate::bench::model::{Cell, Measure, Plot, Series, Table};
use crate::bench::{Bench, Tabulate};
use crate::error::Error;
use crate::verify::{self, Findings, Job, Plan, Progress};

/// Scenes of `verify`: one for each class that can sleep, and the longest.
const SCENES: [&str; 4] = [
    "mutex_lock",
    "cond_wait",
    "region_search",
    "ipc_client_connect_send_over_receive-long",
];

/// The table.
pub struct Promptness;

/// Nobody watches.
struct Silent;

impl Progress for Silent {
    fn begins(&self, _: &verify::Cell, _: u64) {}
    fn point(&self) {}
    fn done(&self, _: &Findings) {}
}

impl Tabulate for Promptness {
    fn id(&self) -> &'static str {
        "promptness"
    }

    fn title(&self) -> &'static str {
        "kernel instructions from a doorbell in the middle of a call until the caller's state is taken"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        if let Some(why) = bench.uncountable() {
            for (scene, column) in SCENES
                .iter()
                .flat_map(|scene| bench.configurations().into_iter().map(move |c| (scene, c)))
            {
                let cell = Cell::missing(*scene, &column.name, Measure::Instructions, why);
                table.cells.push(cell);
            }
            return Ok(());
        }
        let points = if bench.settings().quick { 3 } else { 60 };
        let columns = bench.configurations();
        let cells = columns.iter().flat_map(|column| {
            SCENES.map(|scene| verify::Cell {
                scene: scene.into(),
                configuration: column.configuration,
                vcpus: 1,
            })
        });
        (bench.progress)("taking threads apart");
        let found = verify::verify(&Job {
            cells: cells.collect(),
            plan: Plan {
                stride: 1,
                budget: Some(points),
                seed: bench.settings().seed,
                delay_stride: 1,
                play_all: false,
                into: None,
            },
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
            progress: &Silent,
        })?;
        let mut series = Vec::new();
        for column in &columns {
            let mut all = Vec::new();
            for findings in &found.cells {
                if findings.cell.configuration != column.configuration {
                    continue;
                }
                let delays = findings.delays.iter();
                let samples: Vec<f64> = delays
                    .flat_map(|(delay, count)| std::iter::repeat_n(*delay as f64, *count as usize))
                    .collect();
                all.extend_from_slice(&samples);
                let scene = &findings.cell.scene;
                table
                    .cells
                    .push(bench.cell(scene, &column.name, Measure::Instructions, samples));
            }
            all.sort_by(f64::total_cmp);
            let count = all.len().max(1) as f64;
            let points = all.iter().enumerate();
            series.push(Series {
                name: column.name.clone(),
                points: points
                    .map(|(place, delay)| (*delay, (place + 1) as f64 / count))
                    .collect(),
            });
        }
        table.plots.push(Plot {
            title: "Promptness: the part of the points at which the state was taken so soon".into(),
            x: "kernel instructions".into(),
            y: "part".into(),
            logarithmic: true,
            series,
        });
        table.notes.push(format!(
            "At {points} instructions of each call, drawn at random, the host rings; a thread of the highest priority wakes, and takes the \
             caller's state by thread_get_state with all links. `flukevm verify` does so at all instructions of all calls."
        ));
        Ok(())
    }
}
