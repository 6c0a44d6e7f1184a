//! The kernels' source, compiled for the host and held against the composition: what can be shown without a GPU.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tch::{Device, Kind, TchError, Tensor};

use super::kernel_tests::{self, Subject, config};
use super::kernels::{Angles, Dimensions, Shape};
use super::weight_tests::{self, WeightSubject};
use super::weights::{self, Changed, Selection, Table, Width};
use crate::config::{Architecture, ModelConfig};
use crate::ffi::host_bytes;

/// `cuda/host.cpp` compiled for one model shape.
struct Host {
    dimensions: Dimensions,
    program: PathBuf,
    _folder: tempfile::TempDir,
}

/// An argument of a kernel.
enum Word<'t> {
    Memory(&'t Tensor),
    Null,
    Int(i64),
    Wide(usize),
}

impl<'t> Word<'t> {
    fn or_null(tensor: Option<&'t Tensor>) -> Self {
        tensor.map_or(Self::Null, Self::Memory)
    }
}

impl Host {
    fn of(config: &ModelConfig) -> Self {
        tch::manual_seed(11);
        let dimensions = Dimensions::of(config).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("host");
        // What the build of this crate needs too.
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/host.cpp");
        let definitions = dimensions.macros().into_iter().map(|definition| format!("-D{definition}"));
        let output = Command::new(compiler)
            .args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"])
            .args(definitions)
            .arg(source)
            .arg("-o")
            .arg(&program)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { dimensions, program, _folder: folder }
    }

    /// Runs a kernel over tensors in host memory, which it changes.
    fn run(&self, kernel: &str, Shape { blocks: (columns, lines), threads, .. }: Shape, words: &[Word<'_>]) {
        let text = |word: &Word<'_>| match word {
            Word::Memory(tensor) => {
                let bytes = host_bytes(tensor).unwrap();
                // Aligned as it is here: kernels see to it.
                format!("bytes+{}:{}", bytes.as_ptr().addr() % 16, bytes.len())
            }
            Word::Null => "null".to_owned(),
            Word::Int(value) => format!("int:{value}"),
            Word::Wide(value) => format!("wide:{value}"),
        };
        let mut child = Command::new(&self.program)
            .args([kernel.to_owned(), columns.to_string(), lines.to_string(), threads.to_string()])
            .args(words.iter().map(text))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let tensors: Vec<&Tensor> = words
            .iter()
            .filter_map(|word| if let Word::Memory(tensor) = word { Some(*tensor) } else { None })
            .collect();
        let mut input = child.stdin.take().unwrap();
        for tensor in &tensors {
            input.write_all(host_bytes(tensor).unwrap()).unwrap();
        }
        drop(input);
        let mut output = child.stdout.take().unwrap();
        for tensor in &tensors {
            let mut bytes = vec![0; host_bytes(tensor).unwrap().len()];
            output.read_exact(&mut bytes).unwrap();
            let changed = Tensor::from_data_size(&bytes, &tensor.size(), tensor.kind());
            tensor.shallow_clone().copy_(&changed);
        }
        assert!(child.wait().unwrap().success(), "{kernel}");
    }
}

impl Subject for Host {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn rows(&self, _: i64) -> i64 {
        7
    }

    fn is_order_the_same(&self) -> bool {
        false
    }

    fn residual_norm(&self, x: &Tensor, addend: Option<&Tensor>, weight: &Tensor, out: &Tensor) {
        let words = [Word::Memory(x), Word::or_null(addend), Word::Memory(weight), Word::Memory(out)];
        self.run("residual_norm", self.dimensions.residual_norm(x.size()[0]).unwrap(), &words);
    }

    fn rotate_queries(&self, qkv: &Tensor, Angles { cos, sin }: Angles<'_>, weight: Option<&Tensor>) {
        let words = [Word::Memory(qkv), Word::Memory(cos), Word::Memory(sin), Word::or_null(weight)];
        self.run("rotate_queries", self.dimensions.rotate_queries(qkv.size()[0]).unwrap(), &words);
    }

    fn gather_keys(
        &self,
        qkv: &Tensor,
        sources: &Tensor,
        Angles { cos, sin }: Angles<'_>,
        weight: Option<&Tensor>,
        out: &Tensor,
    ) {
        let shape = self.dimensions.gather_keys(out.size()[0]).unwrap();
        let [qkv, sources, cos, sin, out] = [qkv, sources, cos, sin, out].map(Word::Memory);
        self.run("gather_keys", shape, &[qkv, sources, cos, sin, Word::or_null(weight), out]);
    }

    fn silu_up(&self, gate_up: &Tensor, out: &Tensor) {
        let shape = self.dimensions.silu_up(out.size()[0]).unwrap();
        self.run("silu_up", shape, &[gate_up, out].map(Word::Memory));
    }

    fn choose(&self, logits: &Tensor, [targets, eos]: [&Tensor; 2], [logprobs, eos_probabilities]: [&Tensor; 2]) {
        let words = [logits, targets, eos, logprobs, eos_probabilities].map(Word::Memory);
        self.run("choose", Dimensions::choose(logits.size()[0]).unwrap(), &words);
    }

    fn select_buckets(&self, hidden: &Tensor, buckets: &Tensor) {
        let rows = hidden.size()[0];
        let words = [Word::Memory(hidden), Word::Memory(buckets), Word::Int(rows)];
        self.run("select_buckets", self.dimensions.select_buckets(rows).unwrap(), &words);
    }
}

/// Tensors that a table names, in the order of their numbers.
#[derive(Default)]
struct Named(RefCell<Vec<Tensor>>);

impl Named {
    /// The number of an argument behind table, number of rows and result, as an address.
    fn address(&self, x: &Tensor, _: Width) -> Result<u64, TchError> {
        let mut named = self.0.borrow_mut();
        let place = named.iter().position(|known| known.data_ptr() == x.data_ptr()).unwrap_or_else(|| {
            named.push(x.shallow_clone());
            named.len() - 1
        });
        Ok((place as u64 + 3) << 48)
    }
}

impl Host {
    fn run_table(&self, kernel: &str, table: &Table, named: Named, result: Option<&Tensor>) {
        let numbers: Vec<i64> = table.numbers.iter().map(|number| number.cast_signed()).collect();
        let (rows, tensors) = (Tensor::from_slice(&numbers), named.0.into_inner());
        let mut words = vec![Word::Memory(&rows), Word::Wide(table.rows), Word::or_null(result)];
        words.extend(tensors.iter().map(Word::Memory));
        self.run(kernel, weights::shape(table.rows), &words);
    }
}

impl WeightSubject for Host {
    fn weights_device(&self) -> Device {
        Device::Cpu
    }

    fn sums(&self, tensors: &[&Tensor]) -> Tensor {
        let (named, sums) = (Named::default(), Tensor::zeros([tensors.len() as i64], (Kind::Int64, Device::Cpu)));
        let table = weights::stretches(tensors, |x, width| named.address(x, width)).unwrap();
        self.run_table("sum_elements", &table, named, Some(&sums));
        sums
    }

    fn differences(&self, changed: &[Changed<'_>]) -> Tensor {
        let (named, sums) = (Named::default(), Tensor::zeros([changed.len() as i64], (Kind::Int64, Device::Cpu)));
        let table = weights::changes(changed, |x, width| named.address(x, width)).unwrap();
        self.run_table("sum_differences", &table, named, Some(&sums));
        sums
    }

    fn copy(&self, pairs: &[(Tensor, Tensor)]) {
        let named = Named::default();
        let table = weights::moves(pairs, |x, width| named.address(x, width)).unwrap();
        self.run_table("copy_elements", &table, named, None);
    }

    fn read(&self, selections: &[Selection<'_>]) {
        let named = Named::default();
        let table = weights::selected(selections, |x, width| named.address(x, width)).unwrap();
        self.run_table("read_elements", &table, named, None);
    }

    fn write(&self, selections: &[Selection<'_>]) {
        let named = Named::default();
        let table = weights::selected(selections, |x, width| named.address(x, width)).unwrap();
        self.run_table("write_elements", &table, named, None);
    }

    fn differ(&self, selections: &[Selection<'_>]) -> Tensor {
        let (named, differ) = (Named::default(), Tensor::zeros([1], (Kind::Int, Device::Cpu)));
        let table = weights::selected(selections, |x, width| named.address(x, width)).unwrap();
        self.run_table("compare_elements", &table, named, Some(&differ));
        differ
    }
}

#[test]
fn kernels_for_weights_compute_what_a_host_does() {
    weight_tests::all(&Host::of(&config([64, 4, 2, 16, 160, 512], Architecture::Qwen3)));
}

fn check(sizes: [usize; 6], architecture: Architecture) {
    let config = config(sizes, architecture);
    kernel_tests::all(&Host::of(&config), &config);
}

#[test]
fn kernels_of_a_real_shape_compute_what_the_composition_does() {
    check([1_536, 12, 2, 128, 8_960, 151_936], Architecture::Qwen2);
}

/// Norms of heads; fewer values than threads everywhere.
#[test]
fn kernels_of_a_small_shape_compute_what_the_composition_does() {
    check([64, 4, 2, 16, 160, 512], Architecture::Qwen3);
}

/// Widths that fill no warp, a head that fills no lane pair, and more keys than queries divide.
#[test]
fn kernels_of_an_odd_shape_compute_what_the_composition_does() {
    check([1_096, 6, 3, 136, 2_056, 5_000], Architecture::Qwen3);
    check([96, 4, 4, 24, 192, 520], Architecture::Llama);
}

/// The sum of a row's squares in the order of libtorch's mean on a GPU (`ATen/native/cuda/Reduce.cuh` of 2.11, for 16 rows and more of
/// 32 to 8,191 columns in a multiple of four): in vectors of four from 128 columns on, the sums of each lane, then those of the lanes
/// that are half a warp apart, and so on.
fn squares_in_libtorchs_order(row: &[f32]) -> f32 {
    let mut lanes = [[0.0_f32; 4]; 32];
    for (column, value) in row.iter().enumerate() {
        let (lane, sum) = if row.len() >= 128 { (column / 4 % 32, column % 4) } else { (column % 32, column / 32) };
        lanes[lane][sum] += value * value;
    }
    let mut sums: Vec<f32> = lanes.map(|[a, b, c, d]| a + b + c + d).to_vec();
    while sums.len() > 1 {
        let upper = sums.split_off(sums.len() / 2);
        sums.iter_mut().zip(upper).for_each(|(sum, other)| *sum += other);
    }
    sums[0]
}

#[test]
fn squares_are_added_in_libtorchs_order() {
    for (hidden, head_dim, architecture) in
        [(1_536, 128, Architecture::Qwen2), (1_096, 128, Architecture::Qwen3), (64, 64, Architecture::Qwen3)]
    {
        let config = config([hidden, 4, 2, head_dim, 160, 512], architecture);
        let host = Host::of(&config);
        let expected = |x: &Tensor, weight: &Tensor| {
            let values = Vec::<f32>::try_from(x.to_kind(Kind::Float).view([-1])).unwrap();
            let width = weight.numel();
            let sums: Vec<f32> = values.chunks_exact(width).map(squares_in_libtorchs_order).collect();
            let means = Tensor::from_slice(&sums) * (1.0 / width as f64);
            let scales = (means + kernel_tests::EPSILON).rsqrt().view([-1, 1]);
            let normed = x.to_kind(Kind::Float).view([-1, width as i64]) * scales;
            (normed.to_kind(Kind::BFloat16) * weight).view_as(x)
        };
        let random = |shape: &[i64]| kernel_tests::random_on(Device::Cpu, shape, 3.0);
        let (rows, columns) = (host.rows(7), hidden as i64);
        let (x, weight) = (random(&[rows, columns]), random(&[columns]));
        let out = kernel_tests::poisoned_on(Device::Cpu, &[rows, columns], Kind::BFloat16);
        host.residual_norm(&x, None, &weight, &out);
        assert_eq!(kernel_tests::difference(&out, &expected(&x, &weight)).0, 0.0, "{hidden} columns");
        if architecture == Architecture::Qwen3 {
            let (qkv, weight) = (random(&[rows, 8, head_dim as i64]), random(&[head_dim as i64]));
            let normed = expected(&qkv.narrow(1, 0, 4).contiguous(), &weight);
            // Angle zero: no rotation.
            let cos = Tensor::ones([rows, head_dim as i64], (Kind::BFloat16, Device::Cpu));
            host.rotate_queries(&qkv, Angles { cos: &cos, sin: &cos.zeros_like() }, Some(&weight));
            assert_eq!(kernel_tests::difference(&qkv.narrow(1, 0, 4), &normed).0, 0.0, "heads of {head_dim}");
        }
    }
}

#[test]
fn options_of_known_shapes_are_those_that_are_compiled_without_a_gpu() {
    let listed = include_str!("../../cuda/options.txt");
    let line = |name: &str, sizes, architecture, rms_norm_eps| {
        let config = ModelConfig { rms_norm_eps, ..config(sizes, architecture) };
        format!("{name} {}", Dimensions::of(&config).unwrap().macros().join(" "))
    };
    let expected = [
        line("qwen2-1.5b", [1_536, 12, 2, 128, 8_960, 151_936], Architecture::Qwen2, 1e-6),
        line("qwen2-7b", [3_584, 28, 4, 128, 18_944, 152_064], Architecture::Qwen2, 1e-6),
        line("qwen3-4b", [2_560, 32, 8, 128, 9_728, 151_936], Architecture::Qwen3, 1e-6),
        line("small", [64, 4, 2, 16, 160, 512], Architecture::Qwen3, 1e-5),
    ];
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);
}
