"""What a running maximum costs beside Hopper's tensor cores: python scripts/bench_softmax.py

Attention's inner loop alone, in CUDA, on 128 keys that stay in shared memory: a warpgroup's scores, softmax, and the
product of the weights before with the values. Printed are the cycles in which every warpgroup does that once, and the
tensor cores' share of their peak, with a running maximum and with a fixed one. Needs nvcc and a Hopper GPU.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path


def product(name: str, numbers: int, left: str, first: bool = False) -> str:
    """A wgmma of 64 rows and 16 of the summed index. ``left``: the first factor lies in shared memory or registers."""
    count = numbers // 2
    places = ", ".join(f"%{i}" for i in range(count))
    shape = f"wgmma.mma_async.sync.aligned.m64n{numbers}k16.f32.bf16.bf16 {{{places}}}"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if left == "shared":
        code, rest = f"{shape}, %{count}, %{count + 1}, {int(not first)}, 1, 1, 0, 0;", '"l"(a), "l"(b)'
        arguments = "unsigned long long a, unsigned long long b"
    else:
        registers = ", ".join(f"%{count + i}" for i in range(4))
        code = f"{shape}, {{{registers}}}, %{count + 4}, 1, 1, 1, 1;"
        rest = '"r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b)'
        arguments = "const unsigned* p, unsigned long long b"
    head = f"__device__ __forceinline__ void {name}(float* d, {arguments})"
    return f'{head} {{ asm volatile("{code}" : {outputs} : {rest}); }}\n'


KERNEL = r"""
#define ARRIVE asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define COMMIT asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
__device__ __forceinline__ float ex2(float x) {
  float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ unsigned pack(float a, float b) {
  unsigned r; asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
__device__ unsigned long long desc(unsigned addr) {
  return (unsigned long long)((addr & 0x3ffff) >> 4) | (64ull << 16) | (64ull << 32) | (1ull << 62); }
// A thread has 32 scores of each of two rows, and D / 4 numbers of each row's output.
template<int D, int RUNNING, int T> __global__ void __launch_bounds__(T, 1)
k(float* out, long long* cyc, int n, float scale) {
  extern __shared__ __align__(1024) char sm[];
  unsigned base = (unsigned)__cvta_generic_to_shared(sm); base = (base + 1023) & ~1023u;
  for (int i = threadIdx.x; i < 160 * 256; i += blockDim.x) ((unsigned*)sm)[i] = 0x3c003c00 + i * 7;
  float s[64], o[D / 2]; unsigned p[32];
  for (int i = 0; i < 64; i++) s[i] = 0; for (int i = 0; i < D / 2; i++) o[i] = 0;
  for (int i = 0; i < 32; i++) p[i] = 0;
  float m0 = -1e30f, m1 = -1e30f, l0 = 0, l1 = 0;
  int wg = threadIdx.x / 128;
  unsigned long long q = desc(base + wg * D * 128), kk = desc(base + 65536), v = desc(base + 98304);
  asm volatile("fence.proxy.async;"); __syncthreads();
  long long t = clock64();
  for (int j = 0; j < n; j++) {
    ARRIVE;
    scores_first(s, q, kk);
#pragma unroll
    for (int i = 1; i < D / 16; i++) scores(s, q + i * 2, kk + i * 2);
    COMMIT;
    ARRIVE;
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (D == 64) values64(o, p + i * 4, v + i * 128); else values128(o, p + i * 4, v + i * 128);
    COMMIT;
    asm volatile("wgmma.wait_group.sync.aligned 1;" : SCORES :: "memory");
    float a0 = m0, a1 = m1;
    if (RUNNING) {
      float x0 = s[0], x1 = s[2];
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        x0 = fmaxf(x0, fmaxf(s[i], s[i + 1])); x1 = fmaxf(x1, fmaxf(s[i + 2], s[i + 3])); }
      x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 2)); x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 1));
      x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 2)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 1));
      m0 = fmaxf(m0, x0 * scale); m1 = fmaxf(m1, x1 * scale);
    }
    float r0 = 0, r1 = 0;
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      s[i] = s[i] * scale - m0; s[i + 1] = s[i + 1] * scale - m0;
      s[i + 2] = s[i + 2] * scale - m1; s[i + 3] = s[i + 3] * scale - m1;
      for (int e = 0; e < 4; e++) s[i + e] = ex2(s[i + e]);
      r0 += s[i] + s[i + 1]; r1 += s[i + 2] + s[i + 3];
    }
    r0 += __shfl_xor_sync(~0u, r0, 2); r1 += __shfl_xor_sync(~0u, r1, 2);
    r0 += __shfl_xor_sync(~0u, r0, 1); r1 += __shfl_xor_sync(~0u, r1, 1);
    float d0 = 1, d1 = 1; if (RUNNING) { d0 = ex2(a0 - m0), d1 = ex2(a1 - m1); }
    l0 = l0 * d0 + r0; l1 = l1 * d1 + r1;
    // Nothing moves across a branch: the softmax stays beside the product.
    asm volatile("{.reg .pred P; setp.eq.s32 P, %0, 123456; @P trap;}" :: "r"(j));
    asm volatile("wgmma.wait_group.sync.aligned 0;" : OUTPUT :: "memory");
#pragma unroll
    for (int i = 0; RUNNING && i < D / 2; i += 4) { o[i] *= d0; o[i + 1] *= d0; o[i + 2] *= d1; o[i + 3] *= d1; }
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
  }
  t = clock64() - t;
  float x = l0 + l1 + m0 + m1; for (int i = 0; i < D / 2; i++) x += o[i]; for (int i = 0; i < 32; i++) x += p[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = x; if (threadIdx.x % 128 == 0) cyc[blockIdx.x * 4 + wg] = t;
}
template<int D, int RUNNING, int T> void go() {
  float* o; long long* c; cudaMalloc(&o, 1 << 22); cudaMalloc(&c, 8 * 600); auto f = k<D, RUNNING, T>;
  cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, 170000);
  int n = 3000; for (int r = 0; r < 3; r++) f<<<132, T, 170000>>>(o, c, n, 0.18f);
  long long h[528]; cudaMemcpy(h, c, sizeof(h), cudaMemcpyDeviceToHost); auto e = cudaGetLastError();
  double turn = (double)h[20] / n;  // of 4 * 64 * 128 * D operations a warpgroup, 4096 a cycle
  printf("head_dim %3d, %d warpgroups, %s maximum: %5.0f cycles a turn, %3.0f %% of the tensor cores' peak %s\n",
    D, T / 128, RUNNING ? "running" : "fixed", turn, 4.0 * D * 128 * T / 2 / 4096 / turn * 100,
    e ? cudaGetErrorString(e) : "");
  cudaFree(o); cudaFree(c);
}
int main() { go<64, 1, 384>(); go<64, 0, 384>(); go<128, 1, 256>(); go<128, 0, 256>(); }
"""


def source() -> str:
    products = [
        product("scores_first", 128, "shared", first=True),
        product("scores", 128, "shared"),
        product("values64", 64, "registers"),
        product("values128", 128, "registers"),
    ]
    kernel = KERNEL
    for name, letter, count in (("SCORES", "s", 64), ("OUTPUT", "o", 32)):
        kernel = kernel.replace(name, ", ".join(f'"+f"({letter}[{i}])' for i in range(count)))
    return "#include <cstdio>\n#include <cuda_runtime.h>\n" + "".join(products) + kernel


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file, program = Path(folder, "softmax.cu"), Path(folder, "softmax")
        file.write_text(source())
        architecture = "arch=compute_90a,code=sm_90a"
        subprocess.run(["nvcc", "-gencode", architecture, "-O3", "-o", str(program), str(file)], check=True)
        subprocess.run([str(program)], check=True)


if __name__ == "__main__":
    main()
