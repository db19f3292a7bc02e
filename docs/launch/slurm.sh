#!/bin/bash
# ZAYA1-8B on 16 nodes of 8 MI300X, data 16 x expert 8: sbatch docs/launch/slurm.sh
#SBATCH --job-name=zaya
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=zaya-%j.log

# As AMD's JAX training images set them on gfx942.
export HSA_NO_SCRATCH_RECLAIM=1
export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_cublaslt=true"

# Two minutes before its time is up, Slurm tells this shell, which lets the run save and stop, and
# puts the job back into the queue.
trap 'out_of_time=yes; kill -TERM "$!"' TERM
srun zaya train pretrain --config zaya1_8b_base1 \
    --set tokenizer=/shared/tokenizer \
    --set 'data.sources=[{path="/shared/corpus/*.jsonl.gz"}]' \
    --set data.cache=/shared/token-cache \
    --out /shared/runs/base1 --distributed &
wait "$!"  # until it ends, or the trap has run
code=$?
if [ -n "$out_of_time" ]; then
    wait "$!"
    scontrol requeue "$SLURM_JOB_ID"
    code=0
fi
exit "$code"
