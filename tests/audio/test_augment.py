import torch

from ultravox.audio.augment import augment_frames, generator_for


def frames(num_clips=64, num_frames=100, num_channels=40):
    torch.manual_seed(0)
    lengths = torch.randint(20, num_frames + 1, (num_clips,))
    values = torch.randn(num_clips, num_frames, num_channels) + 3  # no zeros by chance
    values *= (torch.arange(num_frames) < lengths[:, None])[:, :, None]
    return values, lengths


def augment(seed=0, **options):
    values, lengths = frames()
    return augment_frames(values.clone(), lengths, generator_for(seed, "tune", 0, 0), **options), values, lengths


ALL = dict(time_masks=2, max_time_mask_frames=10, channel_masks=2, max_channel_mask_share=0.2, noise_std=0.1)


def test_pure_function_of_its_seed():
    assert torch.equal(augment(seed=1, **ALL)[0], augment(seed=1, **ALL)[0])
    assert not torch.equal(augment(seed=1, **ALL)[0], augment(seed=2, **ALL)[0])


def test_the_global_random_state_is_left_alone():
    frames()
    before = torch.get_rng_state()
    values, lengths = torch.ones(2, 5, 3), torch.tensor([5, 4])
    augment_frames(values, lengths, generator_for(0), **ALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_off_changes_nothing():
    changed, values, _ = augment()
    assert torch.equal(changed, values)


def test_time_masks_are_few_and_inside_the_clip():
    changed, values, lengths = augment(time_masks=2, max_time_mask_frames=10)
    masked = (changed == 0).all(-1) & (values != 0).any(-1)
    share = masked.sum(1) / lengths
    assert share.max() <= 0.2
    assert masked.sum(1).max() <= 20
    assert (masked.sum(1) > 0).float().mean() > 0.7
    assert torch.equal(changed[~masked], values[~masked])


def test_channel_masks_cover_all_time_and_at_most_their_share():
    changed, _, lengths = augment(channel_masks=1, max_channel_mask_share=0.25)
    silent = torch.stack([(row[:length] == 0).all(0) for row, length in zip(changed, lengths, strict=True)])
    assert silent.sum(1).max() == 10, "40 channels × 0.25"
    assert silent.sum(1).float().mean() > 2
    assert silent.any(0).all(), "every channel has its turn"


def test_noise_is_measured_in_the_clips_own_spread_and_spares_the_padding():
    changed, values, lengths = augment(noise_std=0.5)
    difference = changed - values
    for row, clip, length in zip(difference, values, lengths.tolist(), strict=True):
        ratio = row[:length].square().mean().sqrt() / clip[:length].square().mean().sqrt()
        assert 0.4 < ratio < 0.6
        assert row[length:].eq(0).all()
